"""Checkpoints of all ranks together, written while training goes on.

Saving is two phases. While training waits every rank copies its part of the state to host memory; then a thread in each
rank writes that rank's files and flushes them to the disk. A rank that is done says so by a file beside them. When all
have, rank 0 writes the manifest and gives the checkpoint its name; only then is it durable. Whatever refuses on any
rank fails the whole, and the checkpoints before it stay.
"""

import concurrent.futures
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from services.learner.checkpoint import Checkpoints, Manifest
from services.learner.deepspeed_engine import Engine
from services.learner.host_copy import HostCopies
from services.learner.ranks import Command, Ranks

PART_TIMEOUT_S = 900.0  # how much longer than rank 0 another rank may take to write
POLL_S = 0.05

log = logging.getLogger(__name__)


class PartMissing(RuntimeError):
    """A rank neither wrote its part nor said why."""


class Saver:
    """One in each rank. engines: by their folder. is_async: False writes before training goes on, without copies."""

    def __init__(
        self, checkpoints: Checkpoints, ranks: Ranks, engines: Mapping[str, Engine], *, is_async: bool
    ) -> None:
        self._checkpoints, self._ranks, self._engines, self._is_async = checkpoints, ranks, engines, is_async
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None

    def save(
        self,
        manifest: Manifest,
        add: Callable[[HostCopies], Callable[[Path], None]],
        *,
        need_bytes: int,
    ) -> Future[Path]:
        """Rank 0: returns when the state is copied, with what will be the durable checkpoint.

        add: copies what else there is, and returns what writes it into the folder. A checkpoint under way is waited
        for. Raises CheckpointError when there is too little space; the future raises it when the disk refuses, or
        PartMissing.
        """
        self.wait()
        target = self._checkpoints.begin(manifest.version, need_bytes=need_bytes)
        self._ranks.command(Command.SAVE, manifest.version)
        copies = self._copy(target)
        write_more = add(copies)
        copies.seal()
        self._writing = self._thread.submit(self._write, manifest, target, copies, write_more)
        if not self._is_async:
            self.wait()
        return self._writing

    def follow(self, version: int) -> None:
        """The other ranks: their part of `save`."""
        self.wait()
        target = self._checkpoints.temporary(version)
        copies = self._copy(target).seal()
        self._writing = self._thread.submit(self._write_part, target, copies)
        if not self._is_async:
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written. How it went is in the future that `save` returned."""
        if self._writing is not None:
            concurrent.futures.wait([self._writing])

    def close(self) -> None:
        """Wait, and end the thread."""
        self._thread.shutdown()

    def _copy(self, target: Path) -> HostCopies:
        copies = HostCopies(copies=self._is_async)
        for name, engine in self._engines.items():
            engine.save(target / name, copies)
        return copies

    def _write(self, manifest: Manifest, target: Path, copies: HostCopies, write_more: Callable[[Path], None]) -> Path:
        failure: Exception | None = None
        try:
            copies.write()
            write_more(target)
        except (OSError, RuntimeError) as error:
            failure = error
        failure = self._failure_of_others(target) or failure
        if failure is not None:
            raise self._checkpoints.failed(manifest.version, failure) from failure
        return self._checkpoints.commit(manifest)

    def _failure_of_others(self, target: Path) -> OSError | None:
        """Wait until every other rank is done, well or badly, so that nobody writes here any more."""
        failure, deadline = None, time.monotonic() + PART_TIMEOUT_S
        for rank in range(1, self._ranks.world):
            note = _note(target, rank)
            while not note.exists():
                if time.monotonic() > deadline:
                    raise PartMissing(f"rank {rank} did not write its part of {target} within {PART_TIMEOUT_S:g} s")
                time.sleep(POLL_S)
            if said := note.read_text(encoding="utf-8"):
                failure = OSError(f"rank {rank}: {said}")
            note.unlink()
        return failure

    def _write_part(self, target: Path, copies: HostCopies) -> Path:
        said = ""
        try:
            copies.write()
        except (OSError, RuntimeError) as error:
            said = str(error).strip() or type(error).__name__
            log.error("this rank's part of a checkpoint was not written", extra={"folder": str(target), "error": said})
        note = _note(target, self._ranks.rank)
        fresh = note.with_suffix(".new")
        fresh.write_text(said, encoding="utf-8")
        fresh.rename(note)
        return target


def _note(target: Path, rank: int) -> Path:
    return target / f".rank-{rank:05d}"
