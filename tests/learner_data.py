"""Random trajectories for the learner's tests."""

import numpy as np

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
