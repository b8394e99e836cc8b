"""The order of things, on rank 0: issue tasks, take a batch, train, publish, write metrics, save, acknowledge.

Everything that can be lost is either in Redis or in a checkpoint: trajectories stay pending until the checkpoint
that contains their update is durable, and what a batch lacks, for whatever reason, is issued anew (`_issue`).
The arithmetic is `Trainer`'s, the transfer of weights the publisher's, the account of every task the bookkeeper's.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

from services.contracts.books import INVALID, STALE, format_ranges
from services.contracts.config import RunConfig
from services.contracts.ledger import Ledger, Taken
from services.contracts.wire import Trajectory
from services.learner.batch import defect, fingerprint, whole_groups_first
from services.learner.bookkeeper import Bookkeeper, Closing
from services.learner.checkpoint import CheckpointError, averages
from services.learner.interfaces import MetricsLike, PublisherLike, Report, Summary, TrainerLike
from services.learner.phases import Phases
from services.learner.sampler import TaskSampler
from services.learner.stopwatch import Stopwatch, step_seconds
from services.learner.traces import TaskTraces

CONSUMER = "learner"
TAKE_COUNT = 256
TAKE_BLOCK_S = 0.2  # also how soon a request to stop is noticed
TAKE_AHEAD_BLOCK_S = 0.05  # also how long the end of an update may have to wait
PACK_TIMEOUT_S = 600.0  # weights out of all ranks into one buffer
TIDY_EVERY_S = 1.0  # replacing lost tasks, greeting replicas that joined
RETRY_SAVE_S = 10.0  # while the disk is full

log = logging.getLogger(__name__)


class StarvedError(RuntimeError):
    """A batch did not fill in time."""


class Loop:
    """Runs the learner from `trainer.version` to `run.steps`. Set `stop` to end it early: it saves and returns."""

    def __init__(
        self,
        config: RunConfig,
        *,
        ledger: Ledger,
        publisher: PublisherLike,
        trainer: TrainerLike,
        sampler: TaskSampler,
        metrics: MetricsLike,
        summarise: Summary,
        keep: Callable[[int, Sequence[Trajectory]], None] = lambda _step, _batch: None,
    ) -> None:
        """keep: told the batch of each update that is done, for people to look at."""
        # Measures the version that the replicas have, every so many updates; its figures are the step's too.
        self.evaluate: Callable[[int], Awaitable[Mapping[str, float]]] | None = None
        self._evaluate_every = config.evaluation.every
        self._steps, self._settings = config.run.steps, config.learner
        self._ledger, self._publisher, self._trainer = ledger, publisher, trainer
        self._sampler, self._metrics, self._summarise = sampler, metrics, summarise
        self._keep = keep
        self.stop = asyncio.Event()
        self.trouble: str | None = "starting"  # why the learner is not making progress, for /readyz
        self._next_task = 0
        self._saved_version = trainer.version  # of the newest durable checkpoint
        self._begun_version = trainer.version  # of the newest, durable or being written
        self._writing: asyncio.Task[None] | None = None
        self._since: list[Mapping[str, float]] = []  # figures of the updates since then
        self._held: dict[int, dict[int, Taken]] = {}  # batch -> task_id -> trajectory, in order of arrival
        self._bookkeeper = Bookkeeper(ledger, trainer.books)
        self._dropped = self._stale = 0  # trajectories since the last step: all that were dropped, the too old of them
        self._issued = 0
        self.phases = Phases()
        self._watch = Stopwatch()
        self._publishing: asyncio.Task[Report] | None = None
        self._is_trained = asyncio.Event()
        self._traces = TaskTraces()

    @property
    def collected(self) -> tuple[int, int]:
        """Dialogues of the batch that is being collected, and how many it needs."""
        return len(self._held.get(self._trainer.version, ())), self._settings.batch_dialogues

    async def run(self) -> None:
        """Train until the last step, or until `stop`. Raises StarvedError when no batch fills in time."""
        await self._ledger.open()
        self._next_task = await self._bookkeeper.begin(self._trainer.version, self._trainer.next_task)
        await self._publisher.publish(self._trainer.version)
        self.trouble = None
        self._watch.lap()
        while self._trainer.version < self._steps:
            self.phases.enter("waiting")
            with self._watch.during("wait"):
                batch = await self._collect(self._trainer.version)
            if batch is None:
                break
            figures = await self._train(batch)
            version = self._trainer.version
            if not self.stop.is_set():  # the replicas work while the checkpoint is written
                await self._issue(version)
            if self.evaluate is not None and (version % self._evaluate_every == 0 or version == self._steps):
                figures |= await self._measure(self.evaluate(version), version)
            self._since.append(figures)
            is_due = version % self._settings.checkpoint_every == 0 or version == self._steps
            if (is_due and version > self._begun_version) or self._writing_failed:
                with self._watch.during("checkpoint"):
                    await self._save()
            figures |= step_seconds(self._watch.lap(), figures)
            figures["dialogues_per_s"] = len(batch) / figures["step_s"]
            await self._write_figures(version, figures)
            log.info("step", extra={"step": version, **figures})
        if self._trainer.version > self._saved_version:
            await self._save(durable=True)

    async def _measure(self, evaluation: Awaitable[Mapping[str, float]], version: int) -> Mapping[str, float]:
        """Figures of this version, which stays the replicas' meanwhile; none when asked to stop."""
        self.phases.enter("evaluating")
        _tell("evaluate", version)
        measuring = asyncio.ensure_future(evaluation)
        stopping = asyncio.create_task(self.stop.wait())
        try:
            await asyncio.wait({measuring, stopping}, return_when=asyncio.FIRST_COMPLETED)
            return measuring.result() if measuring.done() else {}
        finally:
            for task in (measuring, stopping):
                task.cancel()
            await asyncio.gather(measuring, stopping, return_exceptions=True)

    async def _train(self, batch: list[Trajectory]) -> dict[str, float]:
        self._publishing = None
        self._is_trained.clear()
        ahead = asyncio.create_task(self._take_ahead(self._trainer.version + 1))
        try:
            return await self._train_beside(ahead, batch)
        finally:  # if the run ends here, nothing of it goes on
            self._is_trained.set()
            beside = [task for task in (ahead, self._publishing) if task is not None and not task.done()]
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)

    async def _train_beside(self, ahead: asyncio.Task[None], batch: list[Trajectory]) -> dict[str, float]:
        figures = self._summarise(batch, version=self._trainer.version)
        figures |= {"dropped": float(self._dropped), "dropped_stale": float(self._stale), "issued": float(self._issued)}
        self._dropped = self._stale = self._issued = 0
        self.phases.enter("training")
        training_at = time.time()
        tasks = format_ranges(trajectory.task_id for trajectory in batch)
        _tell("train", self._trainer.version, tasks=tasks, batch=fingerprint(batch))
        with self._watch.during("update"):
            figures |= await asyncio.to_thread(self._trainer.train, batch, on_actor=self._when_packed())
        self._is_trained.set()
        self.phases.enter("publishing")
        self._traces.trained(batch, self._trainer.version, training_at)
        self._keep(self._trainer.version, batch)
        self._bookkeeper.note_trained(self._trainer.version, [trajectory.task_id for trajectory in batch])
        with self._watch.during("publish"):
            if self._publishing is not None:
                report = await self._publishing
                figures |= {"replicas": float(len(report.updated)), "replicas_dropped": float(len(report.dropped))}
                figures |= {f"publish_{phase}": seconds for phase, seconds in report.seconds.items()}
        with self._watch.during("wait"):
            await ahead
        depth = await self._ledger.depth()
        names = ("waiting", "running", "trajectories_ready", "dead")
        return figures | {f"queue_{name}": float(getattr(depth, name)) for name in names}

    def _when_packed(self) -> Callable[[], None]:
        """What the trainer's thread calls when there are new weights: publishing begins, and goes on beside it."""
        loop = asyncio.get_running_loop()

        async def begin() -> None:
            packed = asyncio.Event()
            self._publishing = asyncio.create_task(self._publish(packed))
            waiting = asyncio.create_task(packed.wait())
            await asyncio.wait({self._publishing, waiting}, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()

        def on_actor() -> None:
            # Replicas may be going down with us; a resumed learner publishes again.
            if not self.stop.is_set() and not self._is_trained.is_set():
                asyncio.run_coroutine_threadsafe(begin(), loop).result(PACK_TIMEOUT_S)

        return on_actor

    async def _publish(self, packed: asyncio.Event) -> Report:
        version = self._trainer.version
        report = await self._publisher.publish(version, packed=packed)
        if not self.stop.is_set() and not await self._ledger.may_lack_writes():
            await self._issue_missing(version)  # the replicas begin the next batch while the critic learns
        return report

    async def _take_ahead(self, version: int) -> None:
        """While an update is under way: the next batch comes in as far as its tasks have been issued, and is packed."""
        wanted, held = self._settings.batch_dialogues, self._held.setdefault(version, {})
        while version < self._steps and not self._is_trained.is_set() and not self.stop.is_set():
            for taken in await self._ledger.take(CONSUMER, TAKE_COUNT, TAKE_AHEAD_BLOCK_S):
                await self._admit(taken, version)
            if len(held) >= wanted:
                await asyncio.to_thread(self._trainer.stage, self._chosen(held), version)
                return

    def _chosen(self, held: Mapping[int, Taken]) -> list[Trajectory]:
        """The batch out of what there is, sorted by task; spare ones are not trained on."""
        there = [taken.trajectory for taken in held.values()]
        chosen = whole_groups_first(there, self._settings.samples_per_problem)[: self._settings.batch_dialogues]
        return sorted(chosen, key=lambda trajectory: trajectory.task_id)

    def _to_ask(self, held: Mapping[int, Taken], asked: set[int]) -> list[Trajectory]:
        """Dialogues of a batch that is still coming in, enough for the models to be asked about together, or none."""
        new = [taken.trajectory for task_id, taken in held.items() if task_id not in asked]
        enough = self._trainer.ask_tokens
        if not enough or sum(len(trajectory.token_ids) for trajectory in new) < enough:
            return []
        asked.update(trajectory.task_id for trajectory in new)
        return new

    async def _collect(self, version: int) -> list[Trajectory] | None:
        """The trajectories of batch `version`, sorted by task; None when asked to stop."""
        wanted, held = self._settings.batch_dialogues, self._held.setdefault(version, {})
        deadline, tidy_at = time.monotonic() + self._settings.take_timeout_s, 0.0
        asking: asyncio.Task[None] | None = None
        asked: set[int] = set()
        while len(held) < wanted:
            if self.stop.is_set():
                break
            if (asking is None or asking.done()) and (new := self._to_ask(held, asked)):
                if asking is not None:
                    await asking
                asking = asyncio.create_task(asyncio.to_thread(self._trainer.ask, new))
            if time.monotonic() >= tidy_at:
                await self._issue(version)
                await self._publisher.catch_up()
                tidy_at = time.monotonic() + TIDY_EVERY_S
            for taken in await self._ledger.take(CONSUMER, TAKE_COUNT, TAKE_BLOCK_S):
                await self._admit(taken, version)
            if len(held) < wanted and time.monotonic() > deadline:
                raise StarvedError(
                    f"batch {version}: {len(held)} of {wanted} dialogues within learner.take_timeout_s "
                    f"({self._settings.take_timeout_s:.0f} s); {await self._ledger.depth()}"
                )
        if asking is not None:
            await asking
        return None if len(held) < wanted else self._chosen(self._held.pop(version))

    async def _issue(self, version: int) -> None:
        """Issue what the batches that may run now lack: the one rule for new, replaced and lost tasks."""
        if await self._ledger.may_lack_writes():
            await self._reconcile()
        await self._issue_missing(version)

    async def _issue_missing(self, version: int) -> None:
        live = await self._ledger.live()
        stale_by = self._settings.max_staleness
        for batch in range(version, min(version + stale_by, self._steps - 1) + 1):
            missing = self._settings.batch_dialogues - live.get(batch, 0)
            if missing <= 0:
                continue
            first, oldest = self._next_task, max(0, batch - stale_by)
            count = self._sampler.count(first, missing)  # groups are issued whole, into one batch
            tasks = [self._sampler.task(first + i, batch=batch, min_version=oldest) for i in range(count)]
            issuing_at = time.time()
            self._next_task = await self._ledger.issue(first, tasks)
            if self._next_task == first + count:  # else the counter was elsewhere: the next round tries again
                self._issued += count
                self._traces.issued(tasks, issuing_at)

    async def _reconcile(self) -> None:
        """Redis was restarted or emptied: give up what only this process still has, so that it is issued anew."""
        with contextlib.suppress(CheckpointError):  # what failed is written again below, or when one is due
            await self._written()
        held = [task_id for batch in self._held.values() for task_id in batch]
        found = await self._bookkeeper.reconcile(self._saved_version, self._next_task, held)
        for there in self._held.values():
            for task_id in found.given_up & there.keys():
                del there[task_id]
        told = {"lost": found.num_lost, "given_up": len(found.given_up), "unsaved": found.num_unsaved}
        log.warning("Redis was restarted; the ledger is in line with the books again", extra=told)
        if found.num_unsaved:  # what a restarted learner would train on is gone: do not depend on it
            await self._save(durable=True)

    async def _admit(self, taken: Taken, version: int) -> None:
        trajectory = taken.trajectory
        self._traces.taken(taken)
        held = self._held.setdefault(trajectory.batch, {}) if trajectory.batch >= version else {}
        if trajectory.batch < version or trajectory.task_id in held:
            return  # a spare one, or a second copy out of a Redis that lost its last second: it goes with its batch
        if reason := defect(trajectory):
            await self._discard(taken, INVALID, detail=reason)
        elif trajectory.oldest_version < trajectory.batch - self._settings.max_staleness:
            self._stale += 1
            await self._discard(taken, STALE, detail=f"version {trajectory.oldest_version}")
        else:
            held[trajectory.task_id] = taken

    async def _discard(self, taken: Taken, reason: str, *, detail: str) -> None:
        """Drop a trajectory; its batch then lacks one, which `_issue` makes good."""
        self._dropped += 1
        await self._ledger.drop([taken.entry_id], reason)
        trajectory = taken.trajectory
        self._traces.dropped(trajectory, reason)
        told = {"task_id": trajectory.task_id, "batch": trajectory.batch, "reason": reason, "detail": detail}
        log.info("dropped", extra=told)

    async def _save(self, *, durable: bool = False) -> float:
        """Begin a checkpoint of the present version, after the one that is being written; durable: wait for it too.

        While the disk is full the run waits here. Returns the seconds that training stood still.
        """
        started = time.monotonic()
        self.phases.enter("saving")
        while True:
            try:
                await self._written()
                if self._trainer.version > self._saved_version:
                    await self._begin_checkpoint()
                if durable:
                    await self._written()
                break
            except CheckpointError as error:
                if not await self._wait_for_room(error):
                    return time.monotonic() - started
        self.trouble = None
        return time.monotonic() - started

    async def _begin_checkpoint(self) -> None:
        version = self._trainer.version
        _tell("checkpoint: close the books", version)
        closed = await self._bookkeeper.close(version)
        _tell("checkpoint: copy", version)
        best = self._settings.checkpoint_best
        is_missing = best.removeprefix("-").startswith("dev_") and not any("dev_accuracy" in f for f in self._since)
        figures = averages(self._since, wanted="" if is_missing else best)  # an early checkpoint, a failed measurement
        writing = await asyncio.to_thread(self._trainer.save, self._next_task, closed.books, figures)
        self._writing = asyncio.create_task(self._acknowledge(writing, closed))
        self._begun_version = version
        self._since = []

    async def _acknowledge(self, writing: Future[Path], closed: Closing) -> None:
        await asyncio.wrap_future(writing)
        self._saved_version = closed.version
        _tell("checkpoint: acknowledge", closed.version)
        await self._bookkeeper.acknowledge(closed)

    async def _written(self) -> None:
        """Until no checkpoint is being written. Raises what became of it."""
        writing, self._writing = self._writing, None
        if writing is not None:
            await writing

    @property
    def _writing_failed(self) -> bool:
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    async def _write_figures(self, version: int, figures: Mapping[str, float]) -> None:
        """While the disk is full the run waits here too: a run without its metrics is worth little."""
        while True:
            try:
                self._metrics.write(version, figures)
                break
            except OSError as error:
                if not await self._wait_for_room(error):
                    return
        self.trouble = None

    async def _wait_for_room(self, error: OSError) -> bool:
        """The disk refuses: wait a while for somebody to make room. False: asked to stop, which is not waited with."""
        self.trouble = f"paused: {error}; free some disk space"
        log.error("paused until the disk takes what is to be written: free some space", extra={"error": str(error)})
        if self.stop.is_set():
            return False
        await self._pause(RETRY_SAVE_S)
        return True

    async def _pause(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self.stop.wait(), timeout=seconds)
        except TimeoutError:
            return


def _tell(phase: str, version: int, **more: str) -> None:
    """Tell the log what begins now: what a run that hangs, hangs in."""
    log.info("phase", extra={"phase": phase, "version": version, **more})
