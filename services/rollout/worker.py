"""Keeps tasks of the ledger running: claims up to a number in flight, renews their leases, completes them.

How one dialogue runs is `runner`'s business. What can go wrong with one task is decided here: a grader that is away
releases it, a task that can never run is buried, anything else is a bug and ends the replica.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

from prometheus_client import Counter, Gauge, Histogram

from services.contracts.ledger import Claim, Ledger
from services.contracts.wire import Task, Trajectory
from services.grader.client import GraderUnavailableError
from services.rollout.runner import GenerationAborted, UnrunnableTask

IDLE_S = 0.05  # between looks at an empty ledger
BUSY_S = 0.01  # between looks when full: dialogues end one by one
RELEASE_PAUSE_S = 1.0  # no claims after a grader deadline: other tasks would meet the same grader

IN_FLIGHT = Gauge("multiattempt_rollout_dialogues_in_flight", "Dialogues of the ledger running now")
DIALOGUES = Counter("multiattempt_rollout_dialogues_total", "Dialogues of the ledger ended", ["outcome"])
TOKENS = Counter("multiattempt_rollout_tokens_sampled_total", "Tokens sampled in completed dialogues")
SECONDS = Histogram("multiattempt_rollout_dialogue_seconds", "Wall time of completed dialogues")

log = logging.getLogger(__name__)


class Runner(Protocol):
    """What the worker needs of `runner.DialogueRunner`."""

    async def run(self, task: Task) -> Trajectory:
        """Run a task to its end."""


class Worker:
    """The claim loop of one replica."""

    def __init__(
        self,
        ledger: Ledger,
        runner: Runner,
        *,
        replica_id: str,
        version: Callable[[], int],
        max_in_flight: int,
        lease_s: float,
    ) -> None:
        self._ledger, self._runner = ledger, runner
        self._replica_id, self._version = replica_id, version
        self._max_in_flight, self._lease_s = max_in_flight, lease_s
        self._running: dict[str, asyncio.Task[None]] = {}  # by the task's entry in the ledger
        self._claims_from = 0.0  # on the monotonic clock
        self.is_draining = False

    @property
    def num_running(self) -> int:
        """Dialogues in flight."""
        return len(self._running)

    async def run(self) -> None:
        """Claim and run until `drain` has been asked for and all is done. Raises what a dialogue could not survive."""
        await self._ledger.open()
        renewing = asyncio.create_task(self._renew())
        try:
            while not (self.is_draining and not self._running):
                self._reap()
                if renewing.done():
                    renewing.result()
                await asyncio.sleep(BUSY_S if await self._claim() else IDLE_S)
        finally:
            renewing.cancel()
            for running in self._running.values():
                running.cancel()  # their leases run out, and others take them
            await asyncio.gather(renewing, *self._running.values(), return_exceptions=True)

    def drain(self) -> None:
        """Claim nothing more; `run` returns when the dialogues in flight have ended."""
        self.is_draining = True

    async def _claim(self) -> bool:
        """Fill the free places; whether anything is running."""
        is_closed = self.is_draining or time.monotonic() < self._claims_from
        free = 0 if is_closed else self._max_in_flight - len(self._running)
        if free > 0:
            for claim in await self._ledger.claim(self._replica_id, self._version(), free):
                running = self._running.get(claim.entry_id)
                if running is None or running.done():  # else its lease ran out here and was taken again: it goes on
                    self._running[claim.entry_id] = asyncio.create_task(self._run_one(claim))
        IN_FLIGHT.set(len(self._running))
        return bool(self._running)

    def _reap(self) -> None:
        for entry_id in [entry_id for entry_id, running in self._running.items() if running.done()]:
            self._running.pop(entry_id).result()

    async def _run_one(self, claim: Claim) -> None:
        started = time.monotonic()
        try:
            trajectory = await self._runner.run(claim.task)
        except UnrunnableTask as error:
            await self._ledger.bury(claim.entry_id, claim.task, str(error))
            log.warning("task buried", extra={"task_id": claim.task.task_id, "reason": str(error)})
            DIALOGUES.labels("buried").inc()
        except GraderUnavailableError as error:
            await self._ledger.release(self._replica_id, claim.entry_id)
            log.warning("task released", extra={"task_id": claim.task.task_id, "reason": str(error)})
            DIALOGUES.labels("released").inc()
            self._claims_from = time.monotonic() + RELEASE_PAUSE_S
        except GenerationAborted:
            await self._ledger.release(self._replica_id, claim.entry_id)
            DIALOGUES.labels("aborted").inc()
        else:
            completed = await self._ledger.complete(claim.entry_id, trajectory)
            DIALOGUES.labels("completed" if completed else "duplicate").inc()
            TOKENS.inc(int(trajectory.action_mask.sum()))
            SECONDS.observe(time.monotonic() - started)

    async def _renew(self) -> None:
        """Renew all leases three times per lease; a task that is no longer ours is abandoned."""
        while True:
            await asyncio.sleep(self._lease_s / 3)
            held = list(self._running)
            for entry_id in set(held) - set(await self._ledger.renew(self._replica_id, held)):
                running = self._running.get(entry_id)
                if running is not None and not running.done():
                    log.info("lease lost", extra={"entry": entry_id})
                    self._running.pop(entry_id).cancel()
