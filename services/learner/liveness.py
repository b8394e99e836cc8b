"""Ranks notice that another is gone or hangs, and end, so that whoever keeps them alive starts all anew.

A rank that is stopped or deadlocked in the interpreter takes the others into a collective that no signal interrupts,
for as long as that one's deadline (minutes: a follower waits there for batches too). So each rank counts in the
store by which the ranks found each other; rank 0 watches all counters, the others that of rank 0.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Protocol

BEATS_PER_TIMEOUT = 5
LONGEST_BEAT_S = 10.0
EXIT_RANK_LOST = 1

log = logging.getLogger(__name__)


class Store(Protocol):
    """What is needed of `torch.distributed.Store`; its methods raise RuntimeError when the server is gone."""

    def set(self, key: str, value: str) -> None:
        """Write."""

    def get(self, key: str) -> bytes:
        """Read; waits until the key exists."""

    def set_timeout(self, timeout: timedelta) -> None:
        """Deadline of each call."""


class Liveness:
    """Watches from `start` to `stop`. store: used by nobody else. on_loss: told why; must not return normally.

    Every rank must have called `announce` before any calls `start` (a barrier between them).
    """

    def __init__(
        self, store: Store, *, rank: int, world: int, timeout_s: float, on_loss: Callable[[str], None] | None = None
    ) -> None:
        self._store, self._rank, self._timeout_s = store, rank, timeout_s
        self._watched = [other for other in range(world) if other != 0] if rank == 0 else [0]
        self._on_loss = on_loss or end_process
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="liveness", daemon=True)
        store.set_timeout(timedelta(seconds=timeout_s))

    def announce(self) -> None:
        """Write this rank's first beat."""
        self._store.set(_key(self._rank), "0")

    def start(self) -> None:
        """Begin to count and to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Watch no more: the others may end now. Waits for a call under way."""
        self._stop.set()
        self._thread.join(self._timeout_s)

    def _run(self) -> None:
        seen = {other: (b"", time.monotonic()) for other in self._watched}
        beat_s = min(self._timeout_s / BEATS_PER_TIMEOUT, LONGEST_BEAT_S)
        beat = 0
        while not self._stop.wait(beat_s):
            beat += 1
            try:
                self._store.set(_key(self._rank), str(beat))
                for other in self._watched:
                    value, now = self._store.get(_key(other)), time.monotonic()
                    if value != seen[other][0]:
                        seen[other] = value, now
            except RuntimeError as error:
                if not self._stop.is_set():
                    self._on_loss(f"the ranks' store does not answer ({str(error).splitlines()[0]})")
                return
            silent = [other for other, (_, since) in seen.items() if time.monotonic() - since > self._timeout_s]
            if silent and not self._stop.is_set():
                self._on_loss(
                    f"rank {', '.join(map(str, silent))} gave no sign of life for {self._timeout_s:g} s "
                    "(learner.rank_timeout_s)"
                )
                return


def end_process(reason: str) -> None:
    """End this process from whatever thread: the main one may hang in a collective."""
    log.critical("ending: another learner rank is lost", extra={"reason": reason})
    for handler in logging.getLogger().handlers:
        handler.flush()
    os._exit(EXIT_RANK_LOST)


def _key(rank: int) -> str:
    return f"alive/{rank}"
