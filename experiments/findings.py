"""What may be claimed of the trainings: the rule for a claim, and how fast reward rises. Pure.

The rule was written before the runs: a claim is settled when the 95 % interval of its difference, over problems, lies
on one side of zero and every pair of trainings agrees. Intervals over problems alone would pass for certain what
another training might undo; of three trainings an interval would say little.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from services.evaluation.compare import Evaluated, Row, compare, pool
from services.evaluation.statistics import Estimate

Verdict = Literal["reproduced", "contradicted", "not settled"]
WINDOW = 5  # updates whose rewards are averaged


@dataclass(frozen=True, slots=True)
class Finding:
    """One difference between two arms, second minus first."""

    figure: Literal["accuracy", "gain"]
    max_attempts: int
    first: Estimate
    second: Estimate
    difference: Estimate
    p: float
    by_training: tuple[float, ...]

    @property
    def verdict(self) -> Verdict:
        """Of the claim that the second is better."""
        low, high = self.difference.low, self.difference.high
        if low is not None and low > 0 and min(self.by_training) > 0:
            return "reproduced"
        if high is not None and high < 0 and max(self.by_training) < 0:
            return "contradicted"
        return "not settled"


def findings(first: Sequence[Evaluated], second: Sequence[Evaluated]) -> list[Finding]:
    """Every accuracy and gain of two arms, pooled and training by training (those of the same seed)."""
    singly = [_rows(compare(*pair).rows) for pair in zip(first, second, strict=True)]
    return [
        Finding(
            figure=row.figure,
            max_attempts=row.max_attempts,
            first=row.first,
            second=row.second,
            difference=row.difference,
            p=row.p,
            by_training=tuple(_value(rows[row.figure, row.max_attempts].difference) for rows in singly),
        )
        for row in compare(pool(first), pool(second)).rows
    ]


def find(found: Sequence[Finding], figure: Literal["accuracy", "gain"], max_attempts: int) -> Finding:
    """The one of that name."""
    [one] = [one for one in found if (one.figure, one.max_attempts) == (figure, max_attempts)]
    return one


@dataclass(frozen=True, slots=True)
class Progress:
    """One training: its reward against the clock. n = updates."""

    seconds: tuple[float, ...]  # [n] since the first update began
    rewards: tuple[float, ...]  # [n] mean of the batch
    staleness: float  # updates between a token's weights and those it trained; mean over the training

    @property
    def smoothed(self) -> tuple[float, ...]:
        """[n] Means of the last WINDOW rewards, of as many as there are at the beginning."""
        return tuple(
            sum(some) / len(some)
            for some in (self.rewards[max(0, i + 1 - WINDOW) : i + 1] for i in range(len(self.rewards)))
        )

    def seconds_to(self, reward: float) -> float | None:
        """When the smoothed reward was first so high, of whole windows; None: never."""
        reached = [
            at for i, (at, now) in enumerate(zip(self.seconds, self.smoothed, strict=True))
            if now >= reward and i + 1 >= WINDOW
        ]  # fmt: skip
        return reached[0] if reached else None


def progress(rows: Sequence[Mapping[str, Any]]) -> Progress:
    """Of the rows of a metrics.jsonl."""
    seconds, passed = [], 0.0
    for row in rows:
        passed += row["step_s"]
        seconds.append(passed)
    staleness = sum(row["staleness_mean"] for row in rows) / max(1, len(rows))
    return Progress(tuple(seconds), tuple(row["reward"] for row in rows), staleness)


def sampled_tokens(rows: Iterable[Mapping[str, Any]]) -> float:
    """Of all the dialogues that a training learnt from; rows: of its metrics.jsonl."""
    return float(sum(row["dialogues"] * row["response_tokens"] for row in rows))


def _rows(rows: Sequence[Row]) -> dict[tuple[str, int], Row]:
    return {(row.figure, row.max_attempts): row for row in rows}


def _value(estimate: Estimate) -> float:
    assert estimate.value is not None
    return estimate.value
