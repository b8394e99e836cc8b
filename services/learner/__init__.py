"""The learner: PPO with DeepSpeed over trajectories that the rollout replicas made.

    loop              the order of things: issue, take, train, publish, save, acknowledge (rank 0)
    interfaces        what the loop needs of the parts it drives
    trainer           one update and one checkpoint, carried out by all ranks together
    ppo               the arithmetic of one update: minibatch steps, their losses and figures
    first_pass        what comes before them: old log-probabilities, values, reference, advantages
    sampler           task number -> task            batch      trajectories -> arrays, minibatches, micro-batches
    advantage         GAE, group-relative, whitening losses     policy and value losses as token sums
    attention         dialogues packed into one row  token_head log-probabilities, the logits never whole in fp32
    stopwatch         where a step's time goes       offload    activations in host memory
    kl                k1, k2, k3, adaptive           mismatch   what was sampled against what is trained
    masking           leaving dialogues out          samples    a few of each update, for people to read
    schedule          learning rate                  models     actor, critic, frozen reference
    deepspeed_engine  the only file that imports DeepSpeed: engines, optimiser steps, weights for publishing
    checkpoint        atomic folders, newest n kept  saver      all ranks' state into one, while training goes on
    host_copy         a state at one moment          export     the Hugging Face folder and its model card
    algorithm         what may not change at resume  universal  checkpoints for another number of ranks
    metrics           metrics.jsonl, TensorBoard, Prometheus
    liveness          ranks notice that one is lost
    ranks             what the ranks tell each other publish    weights to the replicas
    host              the ranks of one host, where nobody else starts them
    prepare, warmup, arithmetic_model, smollm2       the starting model

Nothing is imported here: `python -m services.learner --help` must not load torch.
"""
