"""What the services share, and nothing else: imports no service, no torch, no vLLM.

wire          Task, Trajectory, Verdict and their msgpack encoding
ledger        tasks and trajectories on Redis streams (issue, claim, complete, take, acknowledge)
registry      which rollout replicas are alive, where, and with which weights
config        RunConfig: one TOML file is one experiment
problems      where (question, gold answer) pairs come from
template      dialogue turns -> token ids
telemetry     structured logs, health endpoints, Prometheus metrics
weights/      the weight-transfer protocol: bucket plan (pure) and communicator (torch)
"""
