"""The weight-transfer protocol, which learner and rollout share.

    plan            how named tensors become one flat run of bytes, cut into buckets (pure)
    protocol        the four control messages: join, prepare, commit, abort; deadlines; who speaks what to whom (pure)
    fingerprint     64 bits of a version, the same on any device
    communicator    moving buckets, one surface: gloo, and `nccl`
    staging         a version's bytes at one end; sending and receiving them
    receiver        a replica's worker in a transfer
    file            a version as a safetensors file

A transfer has two phases. PREPARE: every replica receives all bytes into a staging buffer while it goes on
generating, and checks their fingerprints. COMMIT: it pauses, loads, resumes. So a replica is wholly at version v or
v - 1. Who is in the group is a numbered generation, and every message carries it. docs/weights.md is the manual.
"""
