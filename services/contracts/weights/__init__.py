"""The weight-transfer protocol, which learner and rollout share.

    plan            how named tensors become one flat run of bytes, cut into buckets (pure)
    protocol        the four control messages: join, prepare, commit, abort
    communicator    moving buckets: gloo on CPUs, NCCL on GPUs, one surface (torch)

A transfer has two phases. PREPARE: every replica receives all bytes into a staging buffer while it goes on
generating, and checks their digests. COMMIT: it pauses, loads, resumes. So a replica is wholly at version v or
v - 1. Who is in the group is a numbered generation, and every message carries it.
"""
