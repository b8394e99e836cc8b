"""Generalised advantage estimation over action tokens, and whitening (paper.md section 2). NumPy only.

Feedback tokens do not exist here: a dialogue is the sequence of its action tokens, all attempts one after the other,
which equals the reference's GAE with gamma = lambda = 1 across feedback. Dialogues lie flat, one behind the other:
dialogue i is `[offsets[i] : offsets[i + 1]]`.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32] | NDArray[np.float64]

MIN_VARIANCE = 1e-8


def gae(
    rewards: FloatArray, values: FloatArray, offsets: NDArray[np.int64], *, gamma: float, lam: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Advantages and returns of each action token.

    rewards: [D] one per dialogue, earned at its last action token. values: [A] critic's value before each action.
    offsets: [D + 1]. Returns (advantages [A], returns [A] = advantages + values).
    """
    counts = np.diff(offsets)
    longest = int(counts.max(initial=0))
    columns = np.arange(longest)
    # Right-aligned, so that all dialogues end in the last column and one backward sweep serves them all.
    is_action = columns[None, :] >= longest - counts[:, None]
    padded = np.zeros((len(counts), longest + 1))  # a zero value after the end: nothing is bootstrapped
    padded[:, :longest][is_action] = values
    delta = gamma * padded[:, 1:] - padded[:, :-1]
    if longest:
        delta[:, -1] += rewards
    advantages = np.zeros((len(counts), longest))
    running = np.zeros(len(counts))
    for column in range(longest - 1, -1, -1):
        running = delta[:, column] + gamma * lam * running
        advantages[:, column] = running
    flat: NDArray[np.float64] = advantages[is_action]
    return flat, flat + values


class Moments(NamedTuple):
    """Number, sum and sum of squares: those of several ranks add up to those of the whole batch."""

    number: float
    total: float
    squares: float

    @property
    def mean(self) -> float:
        """Mean; 0 of nothing."""
        return self.total / self.number if self.number else 0.0

    @property
    def variance(self) -> float:
        """Biased variance; never negative."""
        return max(self.squares / self.number - self.mean**2, 0.0) if self.number else 0.0


def moments(values: FloatArray) -> Moments:
    """Moments of one rank's share, in double precision."""
    exact = values.astype(np.float64, copy=False)
    return Moments(float(exact.size), float(exact.sum()), float((exact * exact).sum()))


def whiten(advantages: FloatArray, whole: Moments) -> NDArray[np.float32]:
    """(A - mean) / sqrt(max(var, 1e-8)), with the moments of the whole batch on all ranks: float32 [A]."""
    whitened: NDArray[np.float32] = ((advantages - whole.mean) / np.sqrt(max(whole.variance, MIN_VARIANCE))).astype(
        np.float32
    )
    return whitened
