"""What an evaluation measured, its file and its table. Pure but for reading and writing JSON."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LABELS = ("before", "after")


@dataclass(frozen=True, slots=True)
class Point:
    """Dialogues with `max_attempts` allowed attempts: how many ended solved."""

    max_attempts: int
    num_problems: int
    num_solved: int
    num_solved_first: int  # at the first attempt

    @property
    def accuracy(self) -> float:
        """Share solved within the allowed attempts."""
        return self.num_solved / self.num_problems


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One model's accuracy against allowed attempts."""

    label: str
    weight_version: int
    temperature: float
    points: tuple[Point, ...]
    seconds: float
    dialogues_per_s: float


def wilson_interval(successes: int, trials: int, *, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a proportion (95 % by default), (low, high)."""
    if trials == 0:
        return 0.0, 1.0
    p = successes / trials
    centre = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def result_path(run_dir: Path, label: str) -> Path:
    """Where the evaluation named `label` is kept."""
    return run_dir / "evaluation" / f"{label}.json"


def save(evaluation: Evaluation, run_dir: Path) -> Path:
    """Write atomically; returns the path."""
    path = result_path(run_dir, evaluation.label)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(asdict(evaluation), indent=1), encoding="utf-8")
    os.replace(partial, path)
    return path


def load(run_dir: Path, label: str) -> Evaluation | None:
    """The evaluation named `label`, or None when it was not run."""
    try:
        fields: dict[str, Any] = json.loads(result_path(run_dir, label).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    points = tuple(Point(**point) for point in fields.pop("points"))
    return Evaluation(points=points, **fields)


def table(evaluations: Sequence[Evaluation]) -> str:
    """Markdown: a row for each number of allowed attempts, a column for each evaluation, in % (95 % interval)."""
    heads = [f"{e.label} (version {e.weight_version})" for e in evaluations]
    lines = ["| allowed attempts | " + " | ".join(heads) + " |", "|---:|" + "---:|" * len(heads)]
    for max_attempts in sorted({point.max_attempts for e in evaluations for point in e.points}):
        cells = [_cell(e, max_attempts) for e in evaluations]
        lines.append(f"| {max_attempts} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(evaluation: Evaluation, max_attempts: int) -> str:
    for point in evaluation.points:
        if point.max_attempts == max_attempts:
            low, high = wilson_interval(point.num_solved, point.num_problems)
            return f"{100 * point.accuracy:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
    return "-"
