"""What the engine waits for: the time in which no attempt is being sampled, by what the dialogues wait for then."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import Counter

IDLE = Counter(
    "multiattempt_rollout_engine_idle_seconds_total",
    "Time without an attempt to sample: because dialogues wait for verdicts (grading), or there are none (tasks)",
    ["because"],
)


class Occupancy:
    """Counts attempts under way. The metric moves when one begins or ends."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.num_sampled = self._num_judged = 0  # now
        self.num_begun = 0  # attempts, since the start
        self._clock, self._since = clock, clock()

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """An attempt is being sampled."""
        self._note()
        self.num_sampled += 1
        self.num_begun += 1
        try:
            yield
        finally:
            self._note()
            self.num_sampled -= 1

    @contextmanager
    def judging(self) -> Iterator[None]:
        """An attempt waits for its verdict."""
        self._note()
        self._num_judged += 1
        try:
            yield
        finally:
            self._note()
            self._num_judged -= 1

    def _note(self) -> None:
        now = self._clock()
        if not self.num_sampled:
            IDLE.labels("grading" if self._num_judged else "tasks").inc(now - self._since)
        self._since = now
