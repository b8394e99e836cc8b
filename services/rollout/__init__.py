"""Questions in, graded dialogues out: one replica of the generation service.

box             finds the token that closes a `\\boxed{...}` while tokens stream (pure)
dialogue        whose turn it is, what may be sampled next, when it is over; builds the trajectory (pure)
environment     the task: prompt, judgement, feedback, reward; built in, or a user's own
reward          verdicts -> reward (pure)
runner          runs one dialogue: engine, box, grader, dialogue
worker          keeps many tasks of the ledger running at once
vllm_engine     the engine: token ids in, token ids and log-probabilities out; the only user of vLLM's AsyncLLM
weights         our weight-transfer engine inside vLLM's worker
weight_control  the control routes of a transfer
gpu_lease       free GPUs, leased in Redis before vLLM is imported
ending          a second signal, a lost GPU: the process ends where it stands
app             HTTP: dialogues on request, health, control
"""
