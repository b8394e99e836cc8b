"""Writes results.md and its pictures into the experiment's folder, out of trainings and evaluations that are there."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes

from experiments.arms import BLIND, FEWER, MULTI, SINGLE, STALE, SYNCHRONOUS, Arm, Training
from experiments.findings import Finding, Progress, find, findings, progress, sampled_tokens
from experiments.reproduce import START, evaluation_name
from services.evaluation.compare import Evaluated, pool
from services.evaluation.outcome import read_evaluated, read_results
from services.evaluation.plot import read_metrics
from services.evaluation.report import number, p_value, percent, table
from services.evaluation.statistics import Estimate
from services.evaluation.summary import Curve, Point, summarise

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PAGE, ACCURACY, REWARD = "results.md", "accuracy.png", "reward.png"
HELDOUT = "heldout"
CLAIM_A = "(a) multi-attempt training gains more from a second attempt"
CLAIM_B = "(b) and is better at one attempt too"
AS_LONG_AS = "staleness 1"  # what the main arm is called among those that differ in staleness


class Findings:
    """What is in one experiment's folder, read when it is asked for."""

    def __init__(self, folder: Path, arms: Sequence[Arm]) -> None:
        self.folder = folder
        self.arms = {arm.name: arm for arm in arms}

    def start(self) -> Curve:
        """Of the model that all arms start from."""
        return read_results(self.folder / "evaluations" / START).curves[HELDOUT]

    def evaluated(self, name: str, feedback: str = "truth", seeds: Sequence[int] = ()) -> list[Evaluated]:
        """An evaluation of each training of an arm, or of those with `seeds`."""
        chosen = seeds or self.arms[name].seeds
        return [read_evaluated(self._folder(name, seed, feedback)) for seed in chosen]

    def pooled(self, name: str) -> Curve:
        """All trainings of an arm as one: intervals over problems."""
        return summarised(self.evaluated(name))

    def curves(self, name: str) -> list[Curve]:
        """A curve for each training, with its independent samples."""
        return [read_results(self._folder(name, seed)).curves[HELDOUT] for seed in self.arms[name].seeds]

    def progress(self, name: str, seeds: Sequence[int] = ()) -> list[Progress]:
        """The course of each training, or of those with `seeds`."""
        return [progress(rows) for rows in self._metrics(name, seeds)]

    def tokens(self, name: str) -> float:
        """Sampled in a training, mean over its seeds."""
        return fmean(sampled_tokens(rows) for rows in self._metrics(name))

    def compared(self, first: str, second: str) -> list[Finding]:
        """Second minus first, of the seeds that both were trained with."""
        seeds = [seed for seed in self.arms[first].seeds if seed in self.arms[second].seeds]
        return findings(self.evaluated(first, seeds=seeds), self.evaluated(second, seeds=seeds))

    def _metrics(self, name: str, seeds: Sequence[int] = ()) -> list[list[dict[str, Any]]]:
        runs = [self.folder / Training(self.arms[name], seed).name for seed in seeds or self.arms[name].seeds]
        return [list(read_metrics(run / "metrics.jsonl")) for run in runs]

    def _folder(self, name: str, seed: int, feedback: str = "truth") -> Path:
        return self.folder / "evaluations" / evaluation_name(Training(self.arms[name], seed), feedback)


def summarised(trainings: Sequence[Evaluated]) -> Curve:
    """Several trainings as one: their dialogues are further seeds of each problem."""
    whole = pool(trainings)
    return summarise(whole.header, whole.dialogues).curves[HELDOUT]


def write(folder: Path, arms: Sequence[Arm]) -> Path:
    """The page and its pictures; what arms are not there is left out. Raises ConfigError where one is not finished."""
    found = Findings(folder, arms)
    parts = ["# Results", "## Accuracy against allowed attempts", _accuracy(found), _budgets(found)]
    if {MULTI, SINGLE} <= set(found.arms):
        parts += ["## The paper's claims", _claims(found)]
    parts += ["## Feedback against resampling", _resampling(found)]
    if {MULTI, BLIND} <= set(found.arms):
        parts += ["## Honest feedback against none", _blind(found)]
    if {MULTI, SYNCHRONOUS, STALE} <= set(found.arms):
        parts += ["## Staleness", _staleness(found)]
    _draw_accuracy(found, folder / ACCURACY)
    _draw_reward(found, folder / REWARD)
    page = folder / PAGE
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


def _accuracy(found: Findings) -> str:
    start = found.start()
    head = ["", *(f"{point.max_attempts} attempt{'s' * (point.max_attempts > 1)}" for point in start.points)]
    rows = [["the start of all", *_accuracies(start.points)]]
    rows += [[arm.title, *_accuracies(found.pooled(arm.name).points)] for arm in found.arms.values()]
    return table(head, rows)


def _budgets(found: Findings) -> str:
    rows = []
    for arm in found.arms.values():
        runs = found.progress(arm.name)
        rewards = [run.smoothed[-1] for run in runs]
        rows.append(
            [
                arm.title, str(len(runs)), f"{fmean(len(run.seconds) for run in runs):.0f}",
                f"{found.tokens(arm.name):,.0f}", f"{fmean(run.seconds[-1] for run in runs):.0f}",
                f"{fmean(rewards):.3f} ({_range(rewards, '.3f')})",
            ]
        )  # fmt: skip
    head = ["", "trainings", "updates", "sampled tokens", "seconds of a training", "reward at the end"]
    return table(head, rows)


def _claims(found: Findings) -> str:
    compared = found.compared(SINGLE, MULTI)
    claims = [(CLAIM_A, find(compared, "gain", 2)), (CLAIM_B, find(compared, "accuracy", 1))]
    rows = [
        [claim, _points(one.first), _points(one.second), _points(one.difference, sign="+"), p_value(one.p),
         ", ".join(f"{100 * value:+.1f}" for value in one.by_training), f"**{one.verdict}**"]
        for claim, one in claims
    ]  # fmt: skip
    head = ["claim", found.arms[SINGLE].title, found.arms[MULTI].title, "difference", "p", "by training", "verdict"]
    gains = [one for one in compared if one.figure == "gain"]
    further = [
        [str(one.max_attempts), _points(one.first), _points(one.second), _points(one.difference, sign="+")]
        for one in gains
    ]
    names = ["attempts", found.arms[SINGLE].title, found.arms[MULTI].title, "difference"]
    return f"{table(head, rows)}\n\nGain over one attempt:\n\n{table(names, further)}"


def _resampling(found: Findings) -> str:
    """Means over trainings, in brackets the lowest and the highest."""
    rows = [_resampled("the start of all", [found.start()])]
    rows += [_resampled(arm.title, found.curves(arm.name)) for arm in found.arms.values()]
    names = [point.max_attempts for point in found.start().points if point.max_attempts > 1]
    return table(["", *(f"{n} attempts" for n in names), "recovered at 2", "repeated at 2"], rows)


def _resampled(title: str, curves: Sequence[Curve]) -> list[str]:
    cells = []
    for points in zip(*(curve.points for curve in curves), strict=True):
        gains = [p.same_tokens.gain.value for p in points if p.same_tokens and p.same_tokens.gain.value is not None]
        if points[0].max_attempts > 1:
            cells.append(_mean(gains, sign="+"))
    second = [_point(curve.points, 2) for curve in curves]
    shares = [[p.recovered.value for p in second], [p.repeated.value for p in second]]
    return [title, *cells, *(_mean([value for value in of if value is not None]) for of in shares)]


def _blind(found: Findings) -> str:
    rows = []
    for name in (MULTI, BLIND):
        for feedback in found.arms[name].feedback:
            points = summarised(found.evaluated(name, feedback, FEWER)).points
            rows.append([found.arms[name].title, feedback, *_accuracies(points)])
    ns = [point.max_attempts for point in found.start().points]
    return table(["trained", "feedback when evaluated", *map(str, ns)], rows)


def _staleness(found: Findings) -> str:
    runs = {name: found.progress(name, FEWER) for name in (SYNCHRONOUS, MULTI, STALE)}
    level = min(run.smoothed[-1] for some in runs.values() for run in some)  # every training gets so far
    rows = []
    for name, some in runs.items():
        title = AS_LONG_AS if name == MULTI else found.arms[name].title
        reached = [at for run in some if (at := run.seconds_to(level)) is not None]
        points = summarised(found.evaluated(name, seeds=FEWER)).points
        rows.append(
            [
                title, f"{fmean(run.staleness for run in some):.2f}", f"{fmean(run.seconds[-1] for run in some):.0f}",
                f"{fmean(reached):.0f} ({_range(reached, '.0f')})", f"{fmean(run.smoothed[-1] for run in some):.3f}",
                percent(_point(points, 1).accuracy), percent(_point(points, 2).accuracy),
                percent(_point(points, 5).accuracy),
            ]
        )  # fmt: skip
    head = ["", "staleness seen", "seconds", f"seconds to a reward of {level:.2f}", "reward at the end"]
    return table([*head, "1 attempt", "2 attempts", "5 attempts"], rows)


def _draw_accuracy(found: Findings, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    _curve(axes, found.start(), "the start of all", "tab:gray")
    for name, colour in ((MULTI, "tab:blue"), (SINGLE, "tab:orange")):
        if name in found.arms:
            _curve(axes, found.pooled(name), found.arms[name].title, colour)
    axes.set_xlabel("allowed attempts")
    axes.set_ylabel("held-out problems solved (%)")
    axes.set_xticks([point.max_attempts for point in found.start().points])
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _curve(axes: Axes, curve: Curve, label: str, colour: str) -> None:
    ns = [point.max_attempts for point in curve.points]
    values, lows, highs = zip(*(_whole(point.accuracy) for point in curve.points), strict=True)
    axes.plot(ns, values, marker="o", label=label, color=colour)
    axes.fill_between(ns, lows, highs, alpha=0.15, color=colour)


def _draw_reward(found: Findings, path: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", sharey=True)
    colours = ((MULTI, "tab:blue"), (SINGLE, "tab:orange"), (SYNCHRONOUS, "tab:green"), (STALE, "tab:purple"))
    for name, colour in colours:
        for i, run in enumerate(found.progress(name, FEWER) if name in found.arms else ()):
            title = f"{found.arms[name].title}, {AS_LONG_AS}" if name == MULTI else found.arms[name].title
            label = title if i == 0 else None
            panels[0].plot(range(1, 1 + len(run.seconds)), run.smoothed, color=colour, label=label, alpha=0.8)
            panels[1].plot(run.seconds, run.smoothed, color=colour, alpha=0.8)
    panels[0].set_xlabel("update")
    panels[1].set_xlabel("seconds of training")
    panels[0].set_ylabel("reward, mean of five updates")
    panels[0].legend(fontsize="small")
    for axes in panels:
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _accuracies(points: Iterable[Point]) -> list[str]:
    return [percent(point.accuracy) for point in points]


def _point(points: Sequence[Point], max_attempts: int) -> Point:
    [one] = [point for point in points if point.max_attempts == max_attempts]
    return one


def _points(estimate: Estimate, *, sign: str = "") -> str:
    return number(estimate, scale=100.0, digits=1, sign=sign)


def _mean(values: Sequence[float], *, sign: str = "") -> str:
    """In percentage points; a dash where there are none."""
    if not values:
        return "-"
    hundredfold = [100 * value for value in values]
    told = f"{fmean(hundredfold):{sign}.1f}"
    return told if len(values) == 1 else f"{told} ({_range(hundredfold, f'{sign}.1f')})"


def _range(values: Sequence[float], form: str) -> str:
    return f"{min(values):{form}} to {max(values):{form}}" if values else "-"


def _whole(estimate: Estimate) -> tuple[float, float, float]:
    """In %, value and interval."""
    assert estimate.value is not None and estimate.low is not None and estimate.high is not None
    return 100 * estimate.value, 100 * estimate.low, 100 * estimate.high
