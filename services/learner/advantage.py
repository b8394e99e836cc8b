"""Advantages of action tokens: GAE, returns, group-relative estimators, whitening. NumPy only.

Feedback tokens do not exist here: a dialogue is the sequence of its action tokens, all attempts one after the other,
which equals the reference's GAE with gamma = lambda = 1 across feedback (paper.md section 2). Dialogues lie flat, one
behind the other: dialogue i is `[offsets[i] : offsets[i + 1]]`. A = action tokens, D = dialogues.
"""

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32] | NDArray[np.float64]
GroupEstimator = Literal["grpo", "dr_grpo", "rloo"]

MIN_VARIANCE = 1e-8
MIN_DEVIATION = 1e-6  # added to a group's standard deviation


def gae(
    rewards: FloatArray, values: FloatArray, offsets: NDArray[np.int64], *, gamma: float, lam: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Advantages and returns of each action token (Schulman et al. 2016, arXiv 1506.02438, equation 16).

    rewards: [A] earned by each action. values: [A] critic's value before it. offsets: [D + 1].
    Returns (advantages [A], returns [A] = advantages + values).
    """
    counts = np.diff(offsets)
    longest = int(counts.max(initial=0))
    columns = np.arange(longest)
    # Right-aligned, so that all dialogues end in the last column and one backward sweep serves them all.
    is_action = columns[None, :] >= longest - counts[:, None]
    padded = np.zeros((len(counts), longest + 1))  # a zero value after the end: nothing is bootstrapped
    padded[:, :longest][is_action] = values
    delta = gamma * padded[:, 1:] - padded[:, :-1]
    delta[is_action] += rewards
    advantages = np.zeros((len(counts), longest))
    running = np.zeros(len(counts))
    for column in range(longest - 1, -1, -1):
        running = delta[:, column] + gamma * lam * running
        advantages[:, column] = running
    flat: NDArray[np.float64] = advantages[is_action]
    return flat, flat + values


def returns_to_go(rewards: FloatArray, offsets: NDArray[np.int64], *, gamma: float) -> NDArray[np.float64]:
    """Discounted sum of the rewards from each action on: [A].

    Whitened over the batch, it is the advantage of REINFORCE++ (Hu 2025, arXiv 2501.03262).
    """
    return gae(rewards, np.zeros(len(rewards)), offsets, gamma=gamma, lam=1.0)[0]


def group_advantages(
    estimator: GroupEstimator, scores: FloatArray, groups: NDArray[np.int64], kept: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """One advantage per dialogue, from the others of its group; 0 for one that is alone, or not kept.

    scores: [D] what each dialogue earned. groups: [D] number of its group. kept: [D] which count. Returns [D]:
    grpo: (r - mean) / (std + 1e-6), sample std (Shao et al. 2024, arXiv 2402.03300, section 4.1.2).
    dr_grpo: r - mean (Liu et al. 2025, arXiv 2503.20783); its losses are means over the batch's tokens like all here,
    which differs from its constant divisor by one factor for the whole minibatch.
    rloo: r - mean of the others (Ahmadian et al. 2024, arXiv 2402.14740, equation 10).
    """
    advantages = np.zeros(len(scores))
    _, place = np.unique(groups, return_inverse=True)
    for group in range(int(place.max(initial=-1)) + 1):
        members = np.flatnonzero((place == group) & kept)
        if len(members) < 2:
            continue
        centred = scores[members].astype(np.float64) - np.mean(scores[members], dtype=np.float64)
        if estimator == "grpo":
            centred = centred / (centred.std(ddof=1) + MIN_DEVIATION)
        elif estimator == "rloo":
            centred = centred * len(members) / (len(members) - 1)
        advantages[members] = centred
    return advantages


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
