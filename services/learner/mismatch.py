"""How far the weights that sampled a batch are from those that train on it. NumPy only.

delta = log pi_old(token) - log pi_behaviour(token): pi_old the learner's weights at the start of the update,
pi_behaviour those of the engine when it sampled, with its kernels. What corrects for it token by token is
`losses.importance_weights`.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from services.contracts.wire import Trajectory

OLDEST_BIN = 8  # updates; older tokens are counted with these


def per_dialogue(delta: NDArray[np.float32], offsets: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mean |delta| of each dialogue: [A], [D + 1] -> [D] nats per token. Not finite where a log-probability is not."""
    total = np.add.reduceat(np.abs(delta, dtype=np.float64), offsets[:-1]) if len(offsets) > 1 else np.zeros(0)
    mean: NDArray[np.float64] = total / np.diff(offsets)
    return mean


def is_hopeless(mean: NDArray[np.float64], *, limit: float) -> NDArray[np.bool_]:
    """Which dialogues [D] no importance weight can save: past `limit` nats per token, or not a number at all."""
    hopeless: NDArray[np.bool_] = ~(mean <= limit)
    return hopeless


def staleness(trajectories: Sequence[Trajectory], *, version: int) -> dict[str, float]:
    """Histogram: `staleness_k` is the share of sampled tokens that are k updates older than `version`."""
    ages: dict[int, int] = {}
    for trajectory in trajectories:
        for span in trajectory.versions:
            age = min(max(version - span.version, 0), OLDEST_BIN)
            ages[age] = ages.get(age, 0) + span.end - span.start
    total = sum(ages.values())
    return {f"staleness_{age}": count / total for age, count in sorted(ages.items())}
