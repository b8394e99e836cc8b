"""What the learner is doing, and how much of its time went where: the shares of the last minute, and for ever."""

import time
from collections import deque
from collections.abc import Callable
from typing import Literal

from prometheus_client import Counter

Phase = Literal["waiting", "training", "publishing", "saving", "evaluating"]
WINDOW_S = 60.0

SECONDS = Counter(
    "multiattempt_learner_phase_seconds_total",
    "Time spent waiting (for a batch), training, publishing (weights), saving (a checkpoint), evaluating",
    ["phase"],
)


class Phases:
    """A clock with one hand. `note` moves the metric, `enter` changes the phase."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.current: Phase = "waiting"
        self._clock, self._noted = clock, clock()
        self._recent: deque[tuple[float, Phase, float]] = deque()  # (until, phase, seconds)

    def enter(self, phase: Phase) -> None:
        """From now on the learner does this."""
        self.note()
        self.current = phase

    def note(self) -> None:
        """Count the time since the last call."""
        now = self._clock()
        SECONDS.labels(self.current).inc(now - self._noted)
        self._recent.append((now, self.current, now - self._noted))
        self._noted = now
        while self._recent[0][0] < now - WINDOW_S:
            self._recent.popleft()

    def shares(self) -> dict[str, float]:
        """Share of each phase in about the last WINDOW_S seconds, 0 to 1; empty before any time has passed."""
        totals: dict[str, float] = {}
        for _, phase, seconds in self._recent:
            totals[phase] = totals.get(phase, 0.0) + seconds
        whole = sum(totals.values())
        return {phase: seconds / whole for phase, seconds in totals.items()} if whole > 0 else {}
