"""Keeps tasks of the ledger running: claims while there are places (`admission`), renews leases, completes.

How one dialogue runs is `runner`'s business. What can go wrong with one is decided here, and touches that one alone: a
task that can never run is buried; when the grader is away or the generation was aborted it is given back; any other
error is its failure, which counts, and with too many of those it becomes a dead letter. The replica ends when its
engine is dead, when the ledger is lost, or when one dialogue after another fails: then the fault is its own.

Whatever ends it, the tasks in hand are given back with their progress, so that others go on with them at once.
"""

import asyncio
import functools
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from prometheus_client import Counter, Gauge, Histogram

from services.contracts.ledger import Claim, Ledger
from services.contracts.telemetry import about
from services.contracts.tracing import dialogue_span
from services.contracts.wire import Progress, Task, Trajectory
from services.grader.client import GraderUnavailableError
from services.rollout.runner import EngineDead, GenerationAborted, UnrunnableTask

LOOK_S = 0.05  # between looks at what has ended and may be claimed; the engine has more in stock (`admission.LAG_S`)
RELEASE_PAUSE_S = 1.0  # no claims after a grader deadline: other tasks would meet the same grader
GIVE_BACK_S = 5.0  # at the end, for giving tasks back; what is left then waits for its lease to run out
MAX_FAILURES = 4  # different tasks, with no dialogue completed in between

IN_FLIGHT = Gauge("multiattempt_rollout_dialogues_in_flight", "Dialogues of the ledger running now")
DIALOGUES = Counter("multiattempt_rollout_dialogues_total", "Dialogues of the ledger ended", ["outcome"])
SECONDS = Histogram("multiattempt_rollout_dialogue_seconds", "Wall time of completed dialogues")

log = logging.getLogger(__name__)


class Runner(Protocol):
    """What the worker needs of `runner.DialogueRunner`."""

    async def run(self, task: Task, *, resume: Progress | None, on_progress: Callable[[Progress], None]) -> Trajectory:
        """Run a task to its end, from the progress of an earlier holder if there is one."""


class Saver:
    """Saves a dialogue's progress beside it: one save at a time, of the newest there is."""

    def __init__(self, save: Callable[[Progress], Awaitable[bool]]) -> None:
        self._save = save
        self._newest: Progress | None = None
        self._saving: asyncio.Task[None] | None = None

    def put(self, progress: Progress) -> None:
        """Have it saved. Raises what an earlier save ended with."""
        self._newest = progress
        if self._saving is not None and self._saving.done():
            self._saving.result()
            self._saving = None
        if self._saving is None:
            self._saving = asyncio.create_task(self._save_newest())

    async def flush(self) -> None:
        """Wait until what was put is saved."""
        if self._saving is not None:
            await self._saving

    async def _save_newest(self) -> None:
        while (progress := self._newest) is not None:
            self._newest = None
            await self._save(progress)


@dataclass(slots=True)
class _Running:
    """A dialogue in flight."""

    task_id: int
    work: asyncio.Task[None]
    saver: Saver
    is_leaving: bool = False  # its task is being given back, and may already be claimed again


class Worker:
    """The claim loop of one replica."""

    def __init__(
        self,
        ledger: Ledger,
        runner: Runner,
        *,
        replica_id: str,
        version: Callable[[], int],
        free_places: Callable[[int, int], int],
        lease_s: float,
        grader_timeout_s: float,
    ) -> None:
        """version: of the weights in use. free_places: how many may begin, of dialogues in flight and completed."""
        self._ledger, self._runner = ledger, runner
        self._replica_id, self._version = replica_id, version
        self._free_places, self._lease_s, self._grader_timeout_s = free_places, lease_s, grader_timeout_s
        self._num_completed = 0
        self._running: dict[str, _Running] = {}  # by the task's entry in the ledger
        self._failed: set[str] = set()  # entries, since a dialogue was completed
        self._claims_from = self._drain_until = -math.inf  # on the monotonic clock
        self._graded_at = -math.inf
        self.is_draining = False
        self.is_engine_dead = False  # which of the dialogues was too much for it is not known: it counts for all

    @property
    def num_running(self) -> int:
        """Dialogues in flight."""
        return len(self._running)

    async def run(self) -> None:
        """Claim and run until `drain` has been asked for and all is done. Raises what the replica cannot survive."""
        await self._ledger.open()
        renewing = asyncio.create_task(self._renew())
        try:
            while not self._is_drained():
                self._reap()
                if renewing.done():
                    renewing.result()
                await self._claim()
                await asyncio.sleep(LOOK_S)
        except EngineDead:
            self.is_engine_dead = True
            raise
        finally:
            renewing.cancel()
            await asyncio.gather(renewing, return_exceptions=True)
            await self._give_back(has_failed=self.is_engine_dead)

    def drain(self, grace_s: float) -> None:
        """Claim nothing more; `run` returns when the dialogues in flight have ended, or else gives them back then."""
        if not self.is_draining:
            self.is_draining, self._drain_until = True, time.monotonic() + grace_s

    @property
    def is_grace_over(self) -> bool:
        """Whether draining has taken as long as it may."""
        return self.is_draining and time.monotonic() > self._drain_until

    def _is_drained(self) -> bool:
        return self.is_draining and (not self._running or self.is_grace_over)

    async def _give_back(self, *, has_failed: bool) -> None:
        """Stop what is running and release it with its progress. Raises nothing: leases run out by themselves."""
        held, self._running = self._running, {}
        for running in held.values():
            running.work.cancel()
        await asyncio.gather(*(running.work for running in held.values()), return_exceptions=True)
        releasing = [
            asyncio.create_task(self._release(entry_id, running.saver, has_failed=has_failed))
            for entry_id, running in held.items()
        ]
        if not releasing:
            return
        await asyncio.wait(releasing, timeout=GIVE_BACK_S)
        for one in releasing:
            one.cancel()
        outcomes = await asyncio.gather(*releasing, return_exceptions=True)
        log.info("tasks given back", extra={"released": outcomes.count(True), "held": len(held)})
        DIALOGUES.labels("given back").inc(outcomes.count(True))

    async def _release(self, entry_id: str, saver: Saver, *, has_failed: bool) -> bool:
        await saver.flush()
        if entry_id in self._running:
            self._running[entry_id].is_leaving = True
        return await self._ledger.release(self._replica_id, entry_id, has_failed=has_failed)

    async def _claim(self) -> None:
        """Fill the free places."""
        is_closed = self.is_draining or time.monotonic() < self._claims_from
        free = self._free_places(len(self._running), self._num_completed)
        if free > 0 and not is_closed:
            for claim in await self._ledger.claim(self._replica_id, self._version(), free):
                running = self._running.get(claim.entry_id)
                if running is not None and not running.is_leaving and not running.work.done():
                    continue  # its lease ran out here and came back: it goes on
                saver = Saver(functools.partial(self._ledger.save, self._replica_id, claim.entry_id))
                with about(task_id=claim.task.task_id):
                    work = asyncio.create_task(self._run_one(claim, saver, after=running.work if running else None))
                self._running[claim.entry_id] = _Running(claim.task.task_id, work, saver)
        IN_FLIGHT.set(len(self._running))

    def _reap(self) -> None:
        for entry_id in [entry_id for entry_id, running in self._running.items() if running.work.done()]:
            self._running[entry_id].work.result()  # when it raises, the entry is given back with the rest
            del self._running[entry_id]

    async def _run_one(self, claim: Claim, saver: Saver, *, after: asyncio.Task[None] | None) -> None:
        if after is not None:
            await after  # the same task's last run here: what it raised is not lost
        started = time.monotonic()

        def on_progress(progress: Progress) -> None:
            self._graded_at = time.monotonic()
            saver.put(progress)

        try:
            with dialogue_span(claim.task.task_id, replica=self._replica_id, delivery=claim.deliveries):
                trajectory = await self._runner.run(claim.task, resume=claim.progress, on_progress=on_progress)
        except UnrunnableTask as error:
            await self._ledger.bury(claim.entry_id, claim.task, str(error))
            log.warning("task buried", extra={"reason": str(error)})
            DIALOGUES.labels("buried").inc()
        except GraderUnavailableError as error:
            # A grader that judged others while this one waited is there: it is this answer that it cannot bear.
            is_away = time.monotonic() - self._graded_at > self._grader_timeout_s / 2
            await self._release(claim.entry_id, saver, has_failed=not is_away)
            log.warning("task released", extra={"reason": str(error)})
            DIALOGUES.labels("released").inc()
            if is_away:
                self._claims_from = time.monotonic() + RELEASE_PAUSE_S
        except GenerationAborted:
            await self._release(claim.entry_id, saver, has_failed=False)
            DIALOGUES.labels("aborted").inc()
        except EngineDead:
            raise
        except Exception as error:  # noqa: BLE001 - whatever went wrong with one dialogue, the others go on
            await self._fail(claim, saver, error)
        else:
            await saver.flush()
            completed = await self._ledger.complete(claim.entry_id, trajectory)
            self._num_completed += 1
            self._failed.clear()
            self._graded_at = time.monotonic()
            DIALOGUES.labels("completed" if completed else "duplicate").inc()
            SECONDS.observe(time.monotonic() - started)

    async def _fail(self, claim: Claim, saver: Saver, error: Exception) -> None:
        """Give the task back as failed. Raises the error when too many have failed in a row."""
        log.warning("dialogue failed", exc_info=error)
        await self._release(claim.entry_id, saver, has_failed=True)
        DIALOGUES.labels("failed").inc()
        self._failed.add(claim.entry_id)
        if len(self._failed) >= MAX_FAILURES:
            raise error

    async def _renew(self) -> None:
        """Renew all leases three times per lease; a task that is no longer ours is abandoned."""
        while True:
            await asyncio.sleep(self._lease_s / 3)
            held = list(self._running)
            for entry_id in set(held) - set(await self._ledger.renew(self._replica_id, held)):
                running = self._running.get(entry_id)
                if running is not None and not running.work.done():
                    log.info("lease lost", extra={"task_id": running.task_id})
                    self._running.pop(entry_id).work.cancel()
