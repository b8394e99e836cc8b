"""Random trajectories for the learner's tests, and log-probabilities as one would compute them first."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from services.contracts.wire import Attempt, FinishReason, Timings, Trajectory, Verdict, VersionSpan


def make_trajectory(
    task_id: int, *, seed: int = 0, attempts: int = 2, vocab: int = 50, batch: int = 0, version: int = 0
) -> Trajectory:
    """A dialogue of `attempts` attempts with feedback between them; lengths and tokens are random."""
    random = np.random.default_rng([seed, task_id])
    lengths = [int(random.integers(2, 6))]
    for number in range(attempts):
        lengths += [int(random.integers(1, 7)), int(random.integers(1, 4)) if number < attempts - 1 else 0]
    ends = np.cumsum(lengths)
    mask = np.zeros(ends[-1], dtype=bool)
    spans = [(int(ends[i - 1]), int(ends[i])) for i in range(1, len(ends), 2)]
    for start, end in spans:
        mask[start:end] = True
    logprobs = np.where(mask, -random.uniform(4.7, 6.7, len(mask)), np.nan).astype(np.float32)
    return Trajectory(
        task_id=task_id,
        batch=batch,
        token_ids=random.integers(0, vocab, len(mask)).astype(np.int32),
        action_mask=mask,
        logprobs=logprobs,
        versions=tuple(VersionSpan(version, start, end) for start, end in spans),
        attempts=tuple(
            Attempt(start=start, end=end, extracted="1", verdict=Verdict.INCORRECT, grading_ms=1.0)
            for start, end in spans
        ),
        max_attempts=attempts,
        reward=float(random.choice([1.0, -0.5, -1.0])),
        finish_reason=FinishReason.ATTEMPTS,
        replica_id="rollout-0",
        timings=Timings(generate_s=0.1, grade_s=0.1, total_s=0.2),
    )


def logprobs_from_logits(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature)[target]. logits [A, V] any float dtype; targets [A] int64. Returns fp32 [A]."""
    return -functional.cross_entropy(logits.float() / temperature, targets, reduction="none")


def logprobs_and_entropy(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """The same, and the entropy of the whole distribution, nats: fp32 [2, A], both with gradient."""
    every = torch.log_softmax(logits.float() / temperature, dim=-1)
    chosen = every.gather(-1, targets[:, None]).squeeze(-1)
    return torch.stack([chosen, -(every.exp() * every).sum(-1)])
