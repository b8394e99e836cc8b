"""Two evaluations of the same problems, paired: differences with intervals and p-values. Pure.

For each N how much better the second is; and for each N above the smallest how much more the second gains from the
further attempts, which is what training with several attempts should change.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import msgspec
import numpy as np

from services.contracts.config import ConfigError
from services.evaluation.journal import Dialogue
from services.evaluation.plan import Header
from services.evaluation.report import number, p_value, percent, table
from services.evaluation.statistics import (
    Estimate,
    Floats,
    estimate,
    resample,
    sign_flip_p,
    stratified_sign_flip_p,
)
from services.evaluation.summary import columns, problem_ids

AVERAGE = "average"
_ASKED = ("benchmarks", "attempts", "temperature", "feedback", "problems")
READING = """Second minus first, in percentage points, with 95 % intervals (bootstrap over problems, which are paired).
p: two-sided permutation test over problems, exact for a benchmark, by random signs for the average; not corrected for
the number of rows. Gain: what further attempts add to the accuracy at the smallest number of attempts."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One evaluation, read back."""

    header: Header
    dialogues: Sequence[Dialogue]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One comparison."""

    benchmark: str  # or "average"
    figure: Literal["accuracy", "gain"]
    max_attempts: int
    first: Estimate
    second: Estimate
    difference: Estimate  # second - first
    p: float
    num_problems: int


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """comparison.json."""

    first: Header
    second: Header
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class _Pair:
    """One benchmark's accuracies by N, of problems that both were asked: [P] each, and resampled together [1 + B]."""

    columns: dict[tuple[int, int], Floats]  # (which evaluation, N)
    rows: dict[tuple[int, int], Floats]
    seeds: tuple[int, int]

    def difference(self, weights: dict[int, int]) -> list[Fraction]:
        """Of each problem, exactly; weights: N -> +1 or -1."""
        parts = []
        for which, sign in ((1, 1), (0, -1)):
            for n, weight in weights.items():
                wins = np.rint(self.columns[which, n] * self.seeds[which]).astype(int)
                parts.append([Fraction(int(win) * sign * weight, self.seeds[which]) for win in wins])
        return [sum(of_problem, Fraction(0)) for of_problem in zip(*parts, strict=True)]

    def figure(self, which: int, weights: dict[int, int]) -> Floats:
        """[1 + B]."""
        return np.asarray(sum(weight * self.rows[which, n] for n, weight in weights.items()))


def pool(parts: Sequence[Evaluated]) -> Evaluated:
    """Several trainings of one kind as one: their dialogues are further seeds of each problem.

    Raises ConfigError when they were not asked the same. Intervals stay over problems: of trainings there are too few.
    """
    if len(parts) == 1:
        return parts[0]
    first, dialogues, offset = parts[0].header, list[Dialogue](), 0
    for part in parts:
        settings = part.header.settings
        if other := [name for name in _ASKED if getattr(settings, name) != getattr(first.settings, name)]:
            raise ConfigError(f"{first.model} and {part.header.model} cannot be pooled: other {other[0]}")
        if part.header.data != first.data:
            raise ConfigError(f"{first.model} and {part.header.model} cannot be pooled: other problems")
        dialogues += [
            msgspec.structs.replace(dialogue, seed_index=dialogue.seed_index + offset)
            for dialogue in part.dialogues
            if dialogue.temperature == settings.temperature and dialogue.seed_index < settings.seeds
        ]
        offset += settings.seeds
    pooled = msgspec.structs.replace(first.settings, seeds=offset, samples=0)
    model = " + ".join(part.header.model for part in parts)
    return Evaluated(msgspec.structs.replace(first, model=model, settings=pooled), dialogues)


def compare(first: Evaluated, second: Evaluated) -> Comparison:
    """Raises ConfigError when the two have no benchmark, problem or number of attempts in common."""
    headers = (first.header, second.header)
    names = [name for name in headers[0].settings.benchmarks if name in headers[1].settings.benchmarks]
    attempts = sorted(set(headers[0].settings.attempts) & set(headers[1].settings.attempts))
    if not names or not attempts:
        what = "number of attempts" if names else "benchmark"
        raise ConfigError(f"nothing to compare: {headers[0].model} and {headers[1].model} have no {what} in common")
    pairs = {name: _pair(name, first, second, attempts) for name in names}
    rows = [row for name, pair in pairs.items() for row in _rows(name, [pair], attempts)]
    if len(pairs) > 1:
        rows += _rows(AVERAGE, list(pairs.values()), attempts)
    return Comparison(first=headers[0], second=headers[1], rows=tuple(rows))


def markdown(comparison: Comparison) -> str:
    """A page with the table of accuracies and the one of gains."""
    first, second = comparison.first, comparison.second
    parts = [f"# {second.model} against {first.model}"]
    if different := _different(first, second):
        parts.append(f"They differ in more than the model: {'; '.join(different)}.")
    for figure, title in (("accuracy", "Accuracy"), ("gain", "Gain from further attempts")):
        rows = [row for row in comparison.rows if row.figure == figure]
        if rows:
            head = ["benchmark", "attempts", "first", "second", "difference", "p", "problems"]
            parts += [f"## {title}", table(head, map(_cells, rows))]
    parts.append(READING)
    return "\n\n".join(parts) + "\n"


def _pair(name: str, first: Evaluated, second: Evaluated, attempts: Sequence[int]) -> _Pair:
    sides = [[d for d in side.dialogues if d.benchmark == name] for side in (first, second)]
    shared = set(problem_ids(sides[0])) & set(problem_ids(sides[1]))
    if not shared:
        raise ConfigError(f"{name}: the two evaluations have no problem in common")
    golds = [{d.problem_id: d.gold for d in side} for side in sides]
    if other := [identity for identity in shared if golds[0][identity] != golds[1][identity]]:
        raise ConfigError(f"{name}: the two evaluations have other answers to problem {other[0]}")
    found: dict[tuple[int, int], Floats] = {}
    for which, (side, evaluated) in enumerate(zip(sides, (first, second), strict=True)):
        figures: dict[tuple[Any, ...], Floats] = columns(evaluated.header, [d for d in side if d.problem_id in shared])
        found |= {(which, n): figures["accuracy", n] for n in attempts}
    rows = resample(np.stack(list(found.values()), axis=1), seed=first.header.settings.seed)
    seeds = (first.header.settings.seeds, second.header.settings.seeds)
    return _Pair(found, {key: rows[:, i] for i, key in enumerate(found)}, seeds)


def _rows(name: str, pairs: Sequence[_Pair], attempts: Sequence[int]) -> list[Row]:
    wanted: list[tuple[Literal["accuracy", "gain"], int, dict[int, int]]] = [("accuracy", n, {n: 1}) for n in attempts]
    wanted += [("gain", n, {n: 1, attempts[0]: -1}) for n in attempts[1:]]
    return [_row(name, figure, n, pairs, weights) for figure, n, weights in wanted]


def _row(
    name: str, figure: Literal["accuracy", "gain"], n: int, pairs: Sequence[_Pair], weights: dict[int, int]
) -> Row:
    first, second = (np.asarray(np.mean([pair.figure(which, weights) for pair in pairs], axis=0)) for which in (0, 1))
    differences = [pair.difference(weights) for pair in pairs]
    if len(pairs) == 1:
        p = sign_flip_p(differences[0])
    else:
        p = stratified_sign_flip_p([np.array(group, dtype=np.float64) for group in differences], seed=0)
    return Row(
        benchmark=name,
        figure=figure,
        max_attempts=n,
        first=estimate(first),
        second=estimate(second),
        difference=estimate(second - first),
        p=p,
        num_problems=sum(len(group) for group in differences),
    )


def _different(first: Header, second: Header) -> list[str]:
    """Settings that differ and matter to a comparison."""
    found = []
    for name in ("temperature", "feedback"):
        values = [getattr(header.settings, name) for header in (first, second)]
        if values[0] != values[1]:
            found.append(f"{name} {values[0]} and {values[1]}")
    if first.dialogue != second.dialogue:
        found.append("settings of the dialogues (evaluation.json has them)")
    return found


def _cells(row: Row) -> list[str]:
    difference = number(row.difference, scale=100.0, digits=1, sign="+")
    return [
        row.benchmark, str(row.max_attempts), percent(row.first), percent(row.second), difference,
        p_value(row.p),
        str(row.num_problems),
    ]  # fmt: skip
