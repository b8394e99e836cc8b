"""The run's pictures: accuracy against allowed attempts, and the training curves. Needs matplotlib only."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from services.evaluation.results import LABELS, Evaluation, load, wilson_interval

CURVES = (
    ("reward", "reward"),
    ("accuracy_first", "solved at attempt 1"),
    ("accuracy_last", "solved at the last attempt"),
)


def plot_run(run_dir: Path) -> list[Path]:
    """Draw what the run has: `accuracy.png` from its evaluations, `training.png` from its metrics."""
    drawn = []
    evaluations = [e for label in LABELS if (e := load(run_dir, label)) is not None]
    if evaluations:
        drawn.append(_plot_accuracy(evaluations, run_dir / "accuracy.png"))
    metrics = list(read_metrics(run_dir / "metrics.jsonl"))
    if metrics:
        drawn.append(_plot_training(metrics, run_dir / "training.png"))
    return drawn


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """One dict per policy update; a resumed run's repeated steps keep the last value. Nothing if there is no file."""
    if not path.exists():
        return
    by_step: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the line a killed learner was writing
        by_step[row["step"]] = row
    yield from (by_step[step] for step in sorted(by_step))


def _plot_accuracy(evaluations: Iterable[Evaluation], path: Path) -> Path:
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for evaluation in evaluations:
        attempts = [point.max_attempts for point in evaluation.points]
        accuracy = [100 * point.accuracy for point in evaluation.points]
        intervals = [wilson_interval(point.num_solved, point.num_problems) for point in evaluation.points]
        axes.plot(attempts, accuracy, marker="o", label=f"{evaluation.label} (version {evaluation.weight_version})")
        axes.fill_between(
            attempts, [100 * low for low, _ in intervals], [100 * high for _, high in intervals], alpha=0.15
        )
    axes.set_xlabel("allowed attempts")
    axes.set_ylabel("held-out problems solved (%)")
    axes.set_ylim(0, 100)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return _write(figure, path)


def _plot_training(metrics: list[dict[str, Any]], path: Path) -> Path:
    figure, panels = plt.subplots(1, len(CURVES), figsize=(4 * len(CURVES), 3), layout="constrained")
    steps = [row["step"] for row in metrics]
    for axes, (key, title) in zip(panels, CURVES, strict=True):
        axes.plot(steps, [row[key] for row in metrics])
        axes.set_title(title)
        axes.set_xlabel("policy update")
        axes.grid(alpha=0.3)
    return _write(figure, path)


def _write(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
