"""The learner: PPO with DeepSpeed over trajectories that the rollout replicas made.

    loop              the order of things: issue, take, train, publish, save, acknowledge (rank 0)
    trainer           one update and one checkpoint, carried out by all ranks together
    ppo               the arithmetic of one update: old log-probabilities, advantages, minibatch steps
    sampler           task number -> task            batch      trajectories -> arrays, minibatches, micro-batches
    advantage         GAE, whitening                 losses     policy, value and KL losses as token sums
    schedule          learning rate                  models     actor, critic, frozen reference
    deepspeed_engine  the only file that imports DeepSpeed: engines, optimiser steps, weights for publishing
    checkpoint        atomic folders, newest n kept  metrics    metrics.jsonl, TensorBoard, Prometheus
    ranks             what the ranks tell each other publish    weights to the replicas
    prepare, warmup, arithmetic_model, smollm2       the starting model

Nothing is imported here: `python -m services.learner --help` must not load torch.
"""
