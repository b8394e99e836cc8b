"""Finished dialogues -> figures with intervals. Pure.

Accuracy is by the last attempt made. With ground truth the dialogue ends at the first correct attempt, so that is
"solved within N attempts"; without it ("feedback": "none") it is what the model would have handed in.
"""

import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from services.evaluation.benchmarks import KNOWN
from services.evaluation.journal import CORRECT, INCORRECT, Dialogue
from services.evaluation.plan import Header
from services.evaluation.statistics import (
    NOTHING,
    RESAMPLES,
    Estimate,
    Floats,
    at_cost,
    estimate,
    pass_at_k,
    ratio,
    resample,
    tokens_until_solved,
)

_FIGURES = ("accuracy", "any", "first", "failed", "recovered", "repeated", "answered", "tokens", "attempts")


class SameTokens(msgspec.Struct, frozen=True, kw_only=True):
    """Independent samples, stopped by the same oracle, for as many sampled tokens as the dialogues took."""

    samples: float | None  # how many that is; None: more than were drawn
    accuracy: Estimate
    gain: Estimate  # accuracy of the dialogues above it, paired by problem


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """Dialogues with `max_attempts` allowed attempts."""

    max_attempts: int
    accuracy: Estimate
    accuracy_by_seed: tuple[float, ...]
    accuracy_any: Estimate  # in whichever attempt; above `accuracy` only where verdicts are kept from the model
    accuracy_first: Estimate
    recovered: Estimate  # accuracy given that the first attempt failed
    repeated: Estimate  # share of attempts after a wrong answer that give the same answer again
    tokens_per_dialogue: float  # sampled
    tokens_per_solved: Estimate
    attempts_mean: float
    same_tokens: SameTokens | None
    verdicts: dict[str, int]
    truncated: int  # dialogues that ran out of tokens
    refused: int  # dialogues that could not be run; not solved


class PassAt(msgspec.Struct, frozen=True, kw_only=True):
    """k independent single attempts."""

    k: int
    accuracy: Estimate
    tokens: float  # expected, when drawing stops at the first correct one


class Curve(msgspec.Struct, frozen=True, kw_only=True):
    """One benchmark."""

    title: str
    num_problems: int
    points: tuple[Point, ...]
    pass_at: tuple[PassAt, ...]


class Average(msgspec.Struct, frozen=True, kw_only=True):
    """The unweighted mean over benchmarks, as the paper averages."""

    max_attempts: int
    accuracy: Estimate
    accuracy_by_seed: tuple[float, ...]
    gain_at_same_tokens: Estimate


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """Of the last start that asked for anything."""

    dialogues: int
    seconds: float
    dialogues_per_s: float
    sampled_tokens_per_s: float


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """results.json."""

    header: Header
    curves: dict[str, Curve]
    average: tuple[Average, ...]
    speed: Speed | None
    resamples: int = RESAMPLES


class _Rows:
    """Figures of one benchmark's problems, resampled together. Made of columns [P], read as rows [1 + B]."""

    def __init__(self, columns: Mapping[tuple[Any, ...], Floats], *, seed: int) -> None:
        self._index = {name: i for i, name in enumerate(columns)}
        self._rows = resample(np.stack(list(columns.values()), axis=1), seed=seed)

    def __call__(self, *name: Any) -> Floats:
        return self._rows[:, self._index[name]]

    def __contains__(self, name: tuple[Any, ...]) -> bool:
        return name in self._index


def summarise(header: Header, dialogues: Iterable[Dialogue], *, speed: Speed | None = None) -> Results:
    """All figures. Raises ValueError when a dialogue that the settings ask for is missing."""
    by_benchmark: dict[str, list[Dialogue]] = {name: [] for name in header.settings.benchmarks}
    for dialogue in dialogues:
        by_benchmark[dialogue.benchmark].append(dialogue)
    rows = {name: _Rows(columns(header, found), seed=_seed(header, name)) for name, found in by_benchmark.items()}
    curves = {name: _curve(header, name, by_benchmark[name], rows[name]) for name in by_benchmark}
    average = tuple(_average(n, rows, curves) for n in header.settings.attempts)
    return Results(header=header, curves=curves, average=average, speed=speed)


def columns(header: Header, dialogues: Sequence[Dialogue]) -> dict[tuple[Any, ...], Floats]:
    """Figures of each problem, means over its seeds: (figure, N) -> [P], ("pass", k) and ("cost", k) -> [P].

    Problems are in the order of their ids, so two evaluations of the same problems can be paired.
    """
    settings = header.settings
    found: dict[tuple[Any, ...], Floats] = {}
    for n in settings.attempts:
        groups = _by_problem(dialogues, n, settings.temperature, settings.seeds)
        means = [np.mean([_figures(dialogue) for dialogue in group], axis=0) for group in groups]
        for i, name in enumerate(_FIGURES):
            found[name, n] = np.array([mean[i] for mean in means])
    if settings.samples:
        groups = _by_problem(dialogues, 1, settings.sample_temperature, settings.samples)
        for k in range(1, settings.samples + 1):
            found["pass", k] = np.array([pass_at_k(len(g), sum(d.is_solved for d in g), k) for g in groups])
            found["cost", k] = np.array(
                [tokens_until_solved([d.is_solved for d in g], [d.num_sampled for d in g], k) for g in groups]
            )
    return found


def problem_ids(dialogues: Iterable[Dialogue]) -> list[str]:
    """Sorted, as the rows of `columns` are."""
    return sorted({dialogue.problem_id for dialogue in dialogues})


def _by_problem(dialogues: Sequence[Dialogue], n: int, temperature: float, seeds: int) -> list[list[Dialogue]]:
    """The dialogues of one point, a list of `seeds` for each problem."""
    groups: dict[str, list[Dialogue]] = {identity: [] for identity in problem_ids(dialogues)}
    for dialogue in dialogues:
        if (dialogue.max_attempts, dialogue.temperature) == (n, temperature) and dialogue.seed_index < seeds:
            groups[dialogue.problem_id].append(dialogue)
    for identity, group in groups.items():
        if len(group) != seeds:
            raise ValueError(f"problem {identity}: {len(group)} of {seeds} dialogues with {n} attempts")
    return [sorted(group, key=lambda dialogue: dialogue.seed_index) for group in groups.values()]


def _figures(dialogue: Dialogue) -> tuple[float, ...]:
    """In the order of _FIGURES."""
    verdicts = dialogue.verdicts
    failed = verdicts[:1] != (CORRECT,)
    repeated, answered = repeats(dialogue)
    return (
        dialogue.is_solved, CORRECT in verdicts, not failed, failed, failed and dialogue.is_solved,
        repeated, answered, dialogue.num_sampled, len(verdicts),
    )  # fmt: skip


def repeats(dialogue: Dialogue) -> tuple[int, int]:
    """(attempts that give the wrong answer before them once more, attempts after a wrong answer)."""
    again = after_wrong = 0
    for before, now in zip(dialogue.attempts, dialogue.attempts[1:], strict=False):
        if before.verdict == INCORRECT:
            after_wrong += 1
            again += now.extracted is not None and _bare(now.extracted) == _bare(before.extracted or "")
    return again, after_wrong


def _bare(answer: str) -> str:
    return "".join(answer.split()).replace("$", "")


def _curve(header: Header, name: str, dialogues: Sequence[Dialogue], rows: _Rows) -> Curve:
    settings = header.settings
    points = tuple(_point(header, n, dialogues, rows) for n in settings.attempts)
    pass_at = tuple(
        PassAt(k=k, accuracy=estimate(rows("pass", k)), tokens=float(rows("cost", k)[0]))
        for k in range(1, settings.samples + 1)
    )
    title = KNOWN[name].title if name in KNOWN else name
    return Curve(title=title, num_problems=len(problem_ids(dialogues)), points=points, pass_at=pass_at)


def _point(header: Header, n: int, dialogues: Sequence[Dialogue], rows: _Rows) -> Point:
    settings = header.settings
    groups = _by_problem(dialogues, n, settings.temperature, settings.seeds)
    by_seed = tuple(float(np.mean([group[s].is_solved for group in groups])) for s in range(settings.seeds))
    ours = [dialogue for group in groups for dialogue in group]
    return Point(
        max_attempts=n,
        accuracy=estimate(rows("accuracy", n)),
        accuracy_by_seed=by_seed,
        accuracy_any=estimate(rows("any", n)),
        accuracy_first=estimate(rows("first", n)),
        recovered=estimate(ratio(rows("recovered", n), rows("failed", n))) if n > 1 else NOTHING,
        repeated=estimate(ratio(rows("repeated", n), rows("answered", n))),
        tokens_per_dialogue=float(rows("tokens", n)[0]),
        tokens_per_solved=estimate(ratio(rows("tokens", n), rows("accuracy", n))),
        attempts_mean=float(rows("attempts", n)[0]),
        same_tokens=_same_tokens(settings.samples, n, rows) if _has_oracle(header) else None,
        verdicts=dict(sorted(Counter(verdict for d in ours for verdict in d.verdicts).items())),
        truncated=sum(dialogue.finish_reason == "length" for dialogue in ours),
        refused=sum(bool(dialogue.refused) for dialogue in ours),
    )


def _has_oracle(header: Header) -> bool:
    """Whether the dialogues are told what the gold answer says, as pass@k is; else the two are no match."""
    return header.settings.feedback == "truth" and header.settings.samples > 0


def _at_same_tokens(samples: int, n: int, rows: _Rows) -> Floats:
    accuracies = np.stack([rows("pass", k) for k in range(1, samples + 1)], axis=1)
    costs = np.stack([rows("cost", k) for k in range(1, samples + 1)], axis=1)
    return at_cost(accuracies, costs, rows("tokens", n))


def _same_tokens(samples: int, n: int, rows: _Rows) -> SameTokens:
    resampled = _at_same_tokens(samples, n, rows)
    number = np.arange(1, samples + 1, dtype=np.float64)[None]
    costs = np.array([[rows("cost", k)[0] for k in range(1, samples + 1)]])
    equal = at_cost(number, costs, rows("tokens", n)[:1])[0]
    return SameTokens(
        samples=None if np.isnan(equal) else float(equal),
        accuracy=estimate(resampled),
        gain=estimate(rows("accuracy", n) - resampled),
    )


def _average(n: int, rows: Mapping[str, _Rows], curves: Mapping[str, Curve]) -> Average:
    accuracy = np.asarray(np.mean([found("accuracy", n) for found in rows.values()], axis=0))
    points = [point for curve in curves.values() for point in curve.points if point.max_attempts == n]
    gain = NOTHING
    if all(point.same_tokens is not None for point in points):
        samples = max(len(curve.pass_at) for curve in curves.values())
        gains = [found("accuracy", n) - _at_same_tokens(samples, n, found) for found in rows.values()]
        gain = estimate(np.asarray(np.mean(gains, axis=0)))
    by_seed = np.mean([point.accuracy_by_seed for point in points], axis=0)
    return Average(
        max_attempts=n,
        accuracy=estimate(accuracy),
        accuracy_by_seed=tuple(map(float, by_seed)),
        gain_at_same_tokens=gain,
    )


def _seed(header: Header, name: str) -> int:
    """Of a benchmark's resampling: they are drawn independently of one another."""
    return header.settings.seed + zlib.crc32(name.encode())
