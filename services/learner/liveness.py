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
        self._beat_s = min(timeout_s / BEATS_PER_TIMEOUT, LONGEST_BEAT_S)
        self._stop = threading.Event()
        self._seen: dict[int, tuple[bytes, float]] = {}  # the last beat of those watched, and when it was new
        self._answered = 0.0  # when the store last did
        # Two threads: the store's calls know no deadline when the process that serves it is stopped.
        self._threads = [
            threading.Thread(target=work, name=f"liveness-{work.__name__.strip('_')}", daemon=True)
            for work in (self._beat, self._watch)
        ]

    def announce(self) -> None:
        """Write this rank's first beat."""
        self._store.set(_key(self._rank), "0")

    def start(self) -> None:
        """Begin to count and to watch."""
        self._answered = time.monotonic()
        self._seen = {other: (b"", self._answered) for other in self._watched}
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Watch no more: the others may end now. Waits for a call under way."""
        self._stop.set()
        for thread in self._threads:
            thread.join(self._timeout_s)

    def _beat(self) -> None:
        beat = 0
        while not self._stop.wait(self._beat_s):
            beat += 1
            try:
                self._store.set(_key(self._rank), str(beat))
                for other in self._watched:
                    value = self._store.get(_key(other))
                    if value != self._seen[other][0]:
                        self._seen[other] = value, time.monotonic()
            except RuntimeError as error:
                self._lose(f"the ranks' store does not answer ({str(error).splitlines()[0]})")
                return
            self._answered = time.monotonic()

    def _watch(self) -> None:
        while not self._stop.wait(self._beat_s):
            oldest = time.monotonic() - self._timeout_s
            silent = [str(other) for other, (_, since) in self._seen.items() if since < oldest]
            if self._answered < oldest:
                self._lose(f"the ranks' store has not answered for {self._timeout_s:g} s (learner.rank_timeout_s)")
                return
            if silent:
                self._lose(
                    f"rank {', '.join(silent)} gave no sign of life for {self._timeout_s:g} s (learner.rank_timeout_s)"
                )
                return

    def _lose(self, reason: str) -> None:
        if not self._stop.is_set():
            self._stop.set()
            self._on_loss(reason)


def end_process(reason: str) -> None:
    """End this process from whatever thread: the main one may hang in a collective."""
    log.critical("ending: another learner rank is lost", extra={"reason": reason})
    for handler in logging.getLogger().handlers:
        handler.flush()
    os._exit(EXIT_RANK_LOST)


def _key(rank: int) -> str:
    return f"alive/{rank}"
