"""Decoupled multi-attempt reinforcement learning for language models.

The map, in the direction data flows:

    contracts    what the services share: wire types, ledger, registry, settings, templates
    learner      issues tasks, trains PPO on trajectories, publishes weights
    rollout      runs dialogues with vLLM against the grader, pushes trajectories
    grader       judges whether an answer equals the gold answer
    evaluation   accuracy against allowed attempts, through a running rollout service
    cli          the `multiattempt` command and the local launcher

No service imports another; each imports only `contracts`. `tests/unit/test_boundaries.py` says so.
"""
