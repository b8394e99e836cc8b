"""Accuracy against allowed attempts as pictures: the average (the paper's Figure 1) and each benchmark (Figure 5)."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from services.evaluation import published
from services.evaluation.benchmarks import PAPER
from services.evaluation.statistics import Estimate
from services.evaluation.summary import Results

matplotlib.use("Agg")
from matplotlib import pyplot as plt

AVERAGE, BENCHMARKS = "average.png", "benchmarks.png"
COLUMNS = 3
PAPER_COLOURS = {"multi": "tab:green", "base": "tab:gray"}


def draw(results: Sequence[Results], folder: Path) -> list[Path]:
    """A curve for each of `results`, which share benchmarks; the paper's too where the benchmark is one of its."""
    names = [name for name in results[0].curves if all(name in r.curves for r in results)]
    drawn = [_draw_benchmarks(results, names, folder / BENCHMARKS)]
    if len(names) > 1 and all(len(r.curves) == len(names) for r in results):
        drawn.append(_draw_average(results, names, folder / AVERAGE))
    return drawn


def _draw_benchmarks(results: Sequence[Results], names: Sequence[str], path: Path) -> Path:
    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    size = (4.5 * columns, 3.5 * rows)
    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axes in grid.flat[len(names) :]:
        axes.remove()
    for axes, name in zip(grid.flat, names, strict=False):
        for result in results:
            curve = result.curves[name]
            _line(axes, [p.max_attempts for p in curve.points], [p.accuracy for p in curve.points], _label(result))
            if curve.pass_at and result.header.settings.feedback == "truth":
                _resampling(axes, result, name)
        if name in published.CURVES:
            for model in published.LABELS:
                _published(axes, model, published.CURVES[name][model])
        _finish(axes, f"{results[0].curves[name].title} ({results[0].curves[name].num_problems} problems)")
    return _write(figure, path)


def _draw_average(results: Sequence[Results], names: Sequence[str], path: Path) -> Path:
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for result in results:
        _line(axes, [p.max_attempts for p in result.average], [p.accuracy for p in result.average], _label(result))
    if set(names) == set(PAPER):
        for model in published.LABELS:
            _published(axes, model, published.average(model))
    _finish(axes, f"average of {len(names)} benchmarks")
    return _write(figure, path)


def _line(axes: Axes, attempts: Sequence[int], accuracies: Sequence[Estimate], label: str) -> None:
    known = [(n, e.value, e.low, e.high) for n, e in zip(attempts, accuracies, strict=True) if e.value is not None]
    ns = [n for n, *_ in known]
    [line] = axes.plot(ns, [100 * value for _, value, _, _ in known], marker="o", label=label)
    lows = [100 * (value if low is None else low) for _, value, low, _ in known]
    highs = [100 * (value if high is None else high) for _, value, _, high in known]
    axes.fill_between(ns, lows, highs, alpha=0.15, color=line.get_color())


def _resampling(axes: Axes, result: Results, name: str) -> None:
    """Independent samples that cost as many tokens as the dialogues."""
    points = [p for p in result.curves[name].points if p.same_tokens and p.same_tokens.accuracy.value is not None]
    values = [100 * (p.same_tokens.accuracy.value or 0.0) for p in points if p.same_tokens]
    if points:
        colour = axes.lines[-1].get_color()
        label = f"{_label(result)}: resampling for as many tokens"
        axes.plot([p.max_attempts for p in points], values, linestyle=":", color=colour, label=label)


def _published(axes: Axes, model: str, curve: Sequence[float]) -> None:
    axes.plot(
        published.ATTEMPTS,
        curve,
        linestyle="--",
        linewidth=1,
        color=PAPER_COLOURS[model],
        label=published.LABELS[model],
    )


def _label(result: Results) -> str:
    return result.header.model


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("allowed attempts")
    axes.set_ylabel("solved (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _write(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
