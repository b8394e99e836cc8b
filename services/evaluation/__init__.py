"""Accuracy against allowed attempts, through rollout replicas: HTTP only, no engine here. docs/evaluation.md

Of a model on benchmarks (`multiattempt eval`), in the order in which it happens:
benchmarks     where each set's problems are, their fields and number
plan           which dialogues are asked for, with which seeds; when it is the same evaluation again
journal        finished dialogues on disk; a run that was interrupted goes on there
asking         asks replicas for dialogues, many at once
statistics     intervals, paired tests, pass@k: pure
summary        dialogues -> figures
report         figures -> Markdown; published has the paper's curves
figures        figures -> pictures
outcome        writes and reads what is left for people
compare        two evaluations, paired by problem
show           dialogues as text
contamination  evaluation problems among those that are trained on

Of a training run, before and after (`python -m services.evaluation`):
run            asks the run's replicas, N allowed attempts at a time
results        what was measured: counts, intervals, the table; plain JSON on disk
plot           accuracy against allowed attempts, and the training curves, as PNG
"""
