"""Where a step's time goes: at every moment exactly one part is under way, so that the parts sum to the whole."""

import itertools
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

STEP_PARTS = ("wait", "pack", "first_pass", "forward", "backward", "optimiser", "publish", "checkpoint", "other")


class Stopwatch:
    """A clock with one hand, on `REST` until told otherwise.

    On a GPU the moments are events in its stream: the host runs ahead of it and is not made to wait for a reading.
    """

    REST = "other"

    def __init__(self, device: torch.device | None = None) -> None:
        self._on_gpu = device is not None and device.type == "cuda"
        self._part = self.REST
        self._changes: list[tuple[str, float | torch.cuda.Event]] = [(self.REST, self._now())]

    def enter(self, part: str) -> None:
        """From now on it is this."""
        if part != self._part:
            self._part = part
            self._changes.append((part, self._now()))

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """This part, then what it was before."""
        before = self._part
        self.enter(part)
        try:
            yield
        finally:
            self.enter(before)

    def lap(self) -> dict[str, float]:
        """Seconds of each part since the last lap, or the beginning; waits for the GPU."""
        end = self._now()
        changes = [*self._changes, (self._part, end)]
        if isinstance(end, torch.cuda.Event):
            end.synchronize()
        found: dict[str, float] = {}
        for (part, since), (_, until) in itertools.pairwise(changes):
            found[part] = found.get(part, 0.0) + _seconds(since, until)
        self._changes = [(self._part, end)]
        return found

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def step_seconds(of_loop: Mapping[str, float], of_update: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each of STEP_PARTS, and `step_s`, their sum.

    of_loop: a lap whose "update" is the update as a whole. of_update: that one's figures, with its own parts.
    """
    parts = dict.fromkeys(STEP_PARTS, 0.0)
    for part, seconds in of_loop.items():
        parts[part if part in parts else Stopwatch.REST] += seconds
    for part in STEP_PARTS:
        seconds = of_update.get(f"{part}_s", 0.0)
        parts[part] += seconds
        parts[Stopwatch.REST] -= seconds
    return {f"{part}_s": seconds for part, seconds in parts.items()} | {"step_s": sum(parts.values())}


def _seconds(since: float | torch.cuda.Event, until: float | torch.cuda.Event) -> float:
    if isinstance(since, float) and isinstance(until, float):
        return until - since
    assert isinstance(since, torch.cuda.Event) and isinstance(until, torch.cuda.Event)
    return float(since.elapsed_time(until)) / 1e3
