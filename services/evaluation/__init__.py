"""Accuracy against allowed attempts on held-out problems, through running rollout replicas.

run        asks replicas for dialogues, N allowed attempts at a time (HTTP only; no engine here)
results    what was measured: counts, intervals, the table; plain JSON on disk
plot       accuracy against allowed attempts, and the training curves, as PNG
"""
