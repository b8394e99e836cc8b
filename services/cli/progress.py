"""What the user sees while a run goes on: what is starting, then a line for each policy update.

On a terminal a last line stays below them, with what is going on now. Elsewhere only plain lines are written.
"""

import asyncio
import contextlib
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

PERIOD_S = 0.5
HEAD_EVERY = 20
RECENT_STEPS = 10  # the time left is reckoned from these
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


class _Terminal(Console):
    """One whose reader may go away (`| head`): rich would exit, the run goes on unseen."""

    def on_broken_pipe(self) -> None:
        """Be quiet from now on, also when Python flushes at its end."""
        self.quiet = True
        if self.file is sys.stdout:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)


class Progress:
    """Writes to the terminal; one clock for all lines. Use as a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or _Terminal(highlight=False, soft_wrap=True)
        self._status = self._console.status("") if self._console.is_terminal else None
        self._started = time.monotonic()
        self._num_steps = 0
        self._step_s: deque[float] = deque(maxlen=RECENT_STEPS)
        self._doing = ""
        self._last: Callable[[], str] | None = None

    def __enter__(self) -> "Progress":
        if self._status:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status:
            with contextlib.suppress(OSError):
                self._status.stop()
        if self._last:
            self.say(self._last())

    def say(self, line: str) -> None:
        """One line, with the time since the start. A terminal that was closed does not end the run."""
        elapsed = int(time.monotonic() - self._started)
        with contextlib.suppress(OSError):
            self._console.print(Text(f"[{elapsed // 60:3d}:{elapsed % 60:02d}] {line}"), soft_wrap=True)

    def doing(self, what: str) -> None:
        """What is going on from now on."""
        if what != self._doing:
            self._doing = what
            self._show(what)
            self.say(what)

    def now(self, what: str) -> None:
        """What the last line of a terminal shows; elsewhere nothing is written."""
        self._show(what)

    def at_end(self, line: Callable[[], str]) -> None:
        """A line for the very end, made only then."""
        self._last = line

    async def follow(self, metrics: Path, *, steps: int) -> None:
        """Print a line for each new line of metrics.jsonl, until cancelled; those there by then are printed too."""
        tail = Tail(metrics)
        try:
            while True:
                self._steps(tail, steps)
                await asyncio.sleep(PERIOD_S)
        finally:
            self._steps(tail, steps)

    def step(self, row: Mapping[str, Any], *, steps: int) -> None:
        """One policy update."""
        if self._num_steps % HEAD_EVERY == 0:
            self.say("  ".join(name.rjust(width) for name, width in COLUMNS))
        self._num_steps += 1
        if row.get("step_s") is not None:
            self._step_s.append(row["step_s"])
        left_s = (steps - row["step"]) * sum(self._step_s) / len(self._step_s) if self._step_s else None
        self.say(format_step(row, steps=steps, left_s=left_s))
        self._show(f"training: {row['step']}/{steps} steps, {_minutes(left_s)} left")

    def _steps(self, tail: "Tail", steps: int) -> None:
        for row in tail.new_rows():
            self.step(row, steps=steps)

    def _show(self, what: str) -> None:
        if self._status:
            with contextlib.suppress(OSError):
                self._status.update(Text(what))


class Tail:
    """The lines that are added to a metrics.jsonl from now on. A learner that resumes cuts lines off its end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = self._size()

    def new_rows(self) -> list[dict[str, Any]]:
        """Complete lines since the last call."""
        self._position = min(self._position, self._size())
        if self._size() == self._position:
            return []
        with self._path.open("rb") as file:
            file.seek(max(0, self._position - 1))
            if self._position and file.read(1) != b"\n":  # cut off and grown past it since: begin at the next line
                self._position += len(file.readline())
            lines = [line for line in file.readlines() if line.endswith(b"\n")]
        self._position += sum(len(line) for line in lines)
        return [json.loads(line) for line in lines]

    def _size(self) -> int:
        return self._path.stat().st_size if self._path.exists() else 0


def format_step(row: Mapping[str, Any], *, steps: int, left_s: float | None) -> str:
    """The line of one step. row: of metrics.jsonl; a figure that is missing or null is shown as a dash."""
    cells = (
        f"{row['step']}/{steps}",
        _number(row.get("reward"), "+.3f"),
        _number(row.get("accuracy_first"), ".1%"),
        _number(row.get("accuracy_last"), ".1%"),
        _number(row.get("dialogues_per_s"), ".1f"),
        _number(row.get("queue_waiting"), ".0f"),
        _number(row.get("staleness_mean"), ".2f"),
        _number(row.get("version"), ".0f"),
        _minutes(left_s),
    )
    return "  ".join(cell.rjust(width) for cell, (_, width) in zip(cells, COLUMNS, strict=True))


def _minutes(seconds: float | None) -> str:
    return "-" if seconds is None else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
