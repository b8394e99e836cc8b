"""What an evaluation may claim: intervals, paired tests, pass@k. Pure; numpy only.

The unit of observation is the problem: seeds of one problem are averaged first, and resampling is over problems. So an
interval says what another draw of problems of this kind would give, not only what another seed would.

P = problems, F = figures, B = bootstrap resamples, n = independent samples of one problem.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 10_000
LEVEL = 0.95
CHUNK = 2**22  # random numbers held at once
GRID = 1e-12  # sums that differ by less are the same sum


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its bootstrap interval (percentiles). All None where there is nothing to estimate it from."""

    value: float | None
    low: float | None
    high: float | None


NOTHING = Estimate(None, None, None)


def resample(figures: Floats, *, seed: int, resamples: int = RESAMPLES) -> Floats:
    """Means of P problems' figures: as they are, then over problems drawn with replacement. [P, F] -> [1 + B, F].

    What is computed of these rows, ratios and differences too, has its value in row 0 and its distribution below it.
    """
    size = len(figures)
    rng = np.random.default_rng(seed)
    found = [figures.mean(axis=0, keepdims=True)]
    step = max(1, CHUNK // size)
    for start in range(0, resamples, step):
        counts = rng.multinomial(size, np.full(size, 1 / size), size=min(step, resamples - start))
        found.append(counts @ figures / size)
    return np.concatenate(found)


def estimate(rows: Floats) -> Estimate:
    """Value and interval of a figure computed of `resample`'s rows. rows: [1 + B]; NaN where it is not defined."""
    if math.isnan(rows[0]):
        return NOTHING
    drawn = rows[1:][~np.isnan(rows[1:])]
    if not len(drawn):
        return Estimate(float(rows[0]), None, None)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(rows[0]), float(low), float(high))


def ratio(above: Floats, below: Floats) -> Floats:
    """above / below, NaN where below is 0: of sums over problems, as accuracy given that the first attempt failed."""
    found = np.full(len(below), np.nan)
    np.divide(above, below, out=found, where=below > 0)
    return found


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Chance that one of k samples drawn of these, without replacement, is correct: the unbiased estimator."""
    if not 1 <= k <= num_samples:
        raise ValueError(f"k = {k} samples cannot be drawn of {num_samples}")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def tokens_until_solved(correct: Sequence[bool], tokens: Sequence[int], k: int) -> float:
    """Expected tokens of drawing up to k of these samples in random order and stopping at the first correct one.

    That is what resampling costs whoever has the oracle that multi-attempt dialogues are given.
    """
    n = len(correct)
    if not 1 <= k <= n:
        raise ValueError(f"k = {k} samples cannot be drawn of {n}")
    expected = 0.0
    num_correct = sum(correct)
    for is_correct, cost in zip(correct, tokens, strict=True):
        wrong_others = n - 1 - (num_correct - is_correct)
        # It is the j-th drawn with chance 1/n, and is drawn at all if the j - 1 before it, of the others, are wrong.
        reached = sum(math.comb(wrong_others, j - 1) / math.comb(n - 1, j - 1) for j in range(1, k + 1)) / n
        expected += reached * cost
    return expected


def at_cost(accuracies: Floats, costs: Floats, cost: Floats) -> Floats:
    """Accuracy of resampling where it costs `cost`, between the whole numbers of samples by a straight line.

    accuracies, costs: [1 + B, n], of 1 to n samples, costs rising. cost: [1 + B]. NaN where it costs more than n
    samples; where it costs less than one, a share of the problems is answered: the line starts at nothing for nothing.
    """
    found = np.full(len(cost), np.nan)
    start = np.zeros((len(cost), 1))
    xs, ys = np.hstack([start, costs]), np.hstack([start, accuracies])
    for b in np.flatnonzero(cost <= xs[:, -1] * (1 + GRID)):
        found[b] = np.interp(cost[b], xs[b], ys[b])
    return found


def sign_flip_p(differences: Sequence[Fraction]) -> float:
    """Two-sided p-value of a paired permutation test, exact: under the null each difference may as well be negative.

    The share of all sign patterns whose sum is at least as far from zero as the one seen. Computed by convolution over
    the grid of the differences' common denominator: no sampling. 1 where no pair differs.
    """
    scale = math.lcm(*(difference.denominator for difference in differences)) if differences else 1
    sizes = [abs(int(difference * scale)) for difference in differences if difference]
    observed = abs(int(sum(differences) * scale))
    if not observed:
        return 1.0
    total = sum(sizes)
    chances = np.zeros(2 * total + 1)  # of each sum, from -total to total
    chances[total] = 1.0
    for size in sizes:
        chances = (np.roll(chances, size) + np.roll(chances, -size)) / 2  # nothing is at the ends yet
    return float(min(1.0, chances[: total - observed + 1].sum() + chances[total + observed :].sum()))


def stratified_sign_flip_p(groups: Sequence[Floats], *, seed: int, resamples: int = RESAMPLES) -> float:
    """The same for the unweighted mean of several groups' mean differences, by random sign patterns (never 0).

    groups: differences, [P_g] each.
    """
    observed = abs(sum(group.mean() for group in groups))
    rng = np.random.default_rng(seed)
    sums = np.zeros(resamples)
    for group in groups:
        step = max(1, CHUNK // len(group))
        for start in range(0, resamples, step):
            signs = rng.integers(2, size=(min(step, resamples - start), len(group))) * 2.0 - 1.0
            sums[start : start + len(signs)] += signs @ group / len(group)
    as_far = int((np.abs(sums) >= observed - GRID).sum())
    return (as_far + 1) / (resamples + 1)
