"""What the user sees while a run goes on: what is starting, then a line for each policy update."""

import asyncio
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PERIOD_S = 0.5
HEAD_EVERY = 20
COLUMNS = (
    ("step", 9),
    ("reward", 7),
    ("acc@1", 6),
    ("acc@last", 8),
    ("dialogues/s", 11),
    ("queue", 5),
    ("stale", 5),
    ("version", 7),
    ("left", 6),
)


class Progress:
    """Prints lines; one clock for all of them."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._num_lines = 0

    def say(self, line: str) -> None:
        """One line, with the time since the start."""
        elapsed = time.monotonic() - self._started
        print(f"[{int(elapsed) // 60:3d}:{int(elapsed) % 60:02d}] {line}", flush=True)

    async def follow(self, metrics: Path, *, steps: int) -> None:
        """Print a line for each new line of metrics.jsonl, until cancelled. A file that shrinks is read anew."""
        position, first = _size(metrics), None
        while True:
            position = min(position, _size(metrics))
            for row in _rows(metrics, position):
                first = first or (row["step"], time.monotonic() - (row.get("step_s") or 0.0))
                self.step(row, steps=steps, left_s=_left_s(row["step"], steps, *first))
                position += row["bytes"]
            await asyncio.sleep(PERIOD_S)

    def step(self, row: Mapping[str, Any], *, steps: int, left_s: float) -> None:
        """One policy update."""
        if self._num_lines % HEAD_EVERY == 0:
            self.say("  ".join(name.rjust(width) for name, width in COLUMNS))
        self._num_lines += 1
        cells = (
            f"{row['step']}/{steps}",
            _number(row.get("reward"), "+.3f"),
            _number(row.get("accuracy_first"), ".1%"),
            _number(row.get("accuracy_last"), ".1%"),
            _number(row.get("dialogues_per_s"), ".0f"),
            _number(row.get("queue_depth"), ".0f"),
            _number(row.get("staleness_mean"), ".1f"),
            _number(row.get("version"), "d"),
            f"{int(left_s) // 60}:{int(left_s) % 60:02d}",
        )
        self.say("  ".join(cell.rjust(width) for cell, (_, width) in zip(cells, COLUMNS, strict=True)))


def _left_s(step: int, steps: int, first_step: int, first_at: float) -> float:
    done = step - first_step + 1
    return (time.monotonic() - first_at) / done * (steps - step)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _rows(path: Path, position: int) -> list[dict[str, Any]]:
    """Complete lines after `position`; each with its length in bytes."""
    if _size(path) <= position:
        return []
    with path.open("rb") as file:
        file.seek(position)
        lines = [line for line in file.readlines() if line.endswith(b"\n")]
    return [{**json.loads(line), "bytes": len(line)} for line in lines]
