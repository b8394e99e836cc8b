"""A fixed number of worker processes that can be killed, one item at a time each, behind one bounded, fair queue.

The deadline of an item runs from the moment a worker gets it. Past it the worker is killed and replaced (`fork_server`:
in milliseconds), and the item is answered `timeout`; the other workers never notice. Requests take turns: a large batch
delays a small one by one item per worker. What equal means is `equivalence`'s business.
"""

import asyncio
import logging
import math
import signal
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

from services.contracts.wire import Verdict
from services.grader.fork_server import ForkServer, Worker, WorkerError

MAX_WAIT_S = 100.0  # in the queue; below the 120 s after which the trainers we serve give up
BACKOFF_S = (0.1, 0.5, 2.0, 5.0, 10.0)  # between attempts to start a worker
WORKER_MODULE = "services.grader.worker_process"
MAX_CRASHES = 2  # of one item: the first may be the doing of somebody outside
MAX_CRASHES_IN_A_ROW = 16  # of any items: then it is not the items

log = logging.getLogger(__name__)

_SECONDS = Histogram(
    "multiattempt_grader_item_seconds",
    "Time of one item in a worker",
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
_FAILURES = Counter(
    "multiattempt_grader_worker_failures_total",
    "Workers lost, by cause: deadline, memory, crash (it died by itself), start",
    ["cause"],
)
_RECYCLED = Counter("multiattempt_grader_workers_recycled_total", "Workers replaced after worker_max_items")
_WAITING = Gauge("multiattempt_grader_queue_items", "Items that wait for a worker")
_READY = Gauge("multiattempt_grader_workers_ready", "Workers that are warm")


class PoolBusyError(RuntimeError):
    """No verdict now: the queue is full, the wait was too long, or no worker starts. Try again later."""


class BatchTooLargeError(ValueError):
    """More items at once than the queue ever holds: trying again would not help."""


@dataclass(frozen=True, slots=True)
class Item:
    """One comparison: the extracted answer and the gold answers, any of which is right."""

    answer: str
    golds: tuple[str, ...]
    is_explanation: bool = False  # wanted is how the two look, not whether they are equal


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an item; `elapsed_ms` is the time in the worker, never queue time."""

    verdict: Verdict
    method: str | None
    elapsed_ms: float
    explanation: dict[str, Any] | None = None  # of an item that is one: `explain.Explanation`


class _Request:
    """Items that came together and are answered together."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.outcomes: dict[int, Outcome] = {}
        self.done: asyncio.Future[list[Outcome]] = asyncio.get_running_loop().create_future()
        self.jobs = deque(_Job(item, self, index) for index, item in enumerate(items))
        self._num_items = len(items)

    def settle(self, index: int, outcome: Outcome) -> None:
        self.outcomes[index] = outcome
        if len(self.outcomes) == self._num_items and not self.done.done():
            self.done.set_result([self.outcomes[i] for i in range(self._num_items)])

    def refuse(self, reason: str) -> None:
        if not self.done.done():
            self.done.set_exception(PoolBusyError(reason))


@dataclass(slots=True)
class _Job:
    item: Item
    request: _Request
    index: int
    crashes: int = field(default=0)


class _Queue:
    """Jobs by request, one of each in turn."""

    def __init__(self) -> None:
        self._turns: deque[_Request] = deque()
        self._num_jobs = 0

    def __len__(self) -> int:
        return self._num_jobs

    def add(self, request: _Request) -> None:
        self._turns.append(request)
        self._count(len(request.jobs))

    def pop(self) -> _Job | None:
        """The next job that somebody still waits for."""
        while self._turns:
            request = self._turns.popleft()
            if request.done.done():  # its caller has given up
                self._count(-len(request.jobs))
                continue
            job = request.jobs.popleft()
            self._count(-1)
            if request.jobs:
                self._turns.append(request)
            return job
        return None

    def put_back(self, job: _Job) -> None:
        """The job that is to be tried next."""
        if not job.request.jobs:
            self._turns.appendleft(job.request)
        job.request.jobs.appendleft(job)
        self._count(+1)

    def refuse_all(self, reason: str) -> None:
        for request in self._turns:
            request.refuse(reason)
        self._turns.clear()
        self._count(-self._num_jobs)

    def _count(self, change: int) -> None:
        self._num_jobs += change
        _WAITING.set(self._num_jobs)


class Pool:
    """Grades items on `workers` killable processes. Use it on one event loop: `start`, `grade`, `close`."""

    def __init__(
        self,
        *,
        workers: int,
        timeout_s: float,
        queue_size: int,
        worker_memory_mb: int,
        worker_max_items: int,
        worker_module: str = WORKER_MODULE,
    ) -> None:
        self._worker_module = worker_module
        self._timeout_s = timeout_s
        self._memory_mb = worker_memory_mb
        self._max_items = worker_max_items
        self._queue_size = queue_size
        self._queue = _Queue()
        self._num_workers = workers
        self._slots: list[asyncio.Task[None]] = []
        self._server: ForkServer | None = None
        self._forking = asyncio.Lock()
        self._workers: set[Worker] = set()
        self._idle: deque[Worker] = deque()
        self._ready = 0
        self._crashes_in_a_row = 0
        self._start_error: str | None = None

    async def start(self) -> None:
        """Start the workers; returns at once, `not_ready` tells when they are warm."""
        self._slots = [asyncio.create_task(self._slot(), name=f"grader-slot-{i}") for i in range(self._num_workers)]

    async def close(self) -> None:
        """Kill the workers and fail what is still queued with PoolBusyError."""
        for slot in self._slots:
            slot.cancel()
        await asyncio.gather(*self._slots, return_exceptions=True)
        self._queue.refuse_all("the grader is shutting down")
        if self._server is not None:
            await self._server.close()

    def not_ready(self) -> str | None:
        """Why the pool cannot grade now; None when at least one worker is warm."""
        if self._ready:
            return None
        return self._start_error or "no worker process is warm yet"

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the living workers."""
        return [worker.pid for worker in self._workers]

    @property
    def fork_server_pid(self) -> int | None:
        """Process id of the workers' parent."""
        return self._server.pid if self._server is not None else None

    async def grade(self, item: Item) -> Outcome:
        """Grade one item. Raises PoolBusyError."""
        return (await self.grade_all([item]))[0]

    async def grade_all(self, items: Sequence[Item]) -> list[Outcome]:
        """Grade items side by side, in order: all are queued, or none. Raises PoolBusyError, BatchTooLargeError."""
        if not items:
            return []
        if self._start_error and not self._ready:
            raise PoolBusyError(self._start_error)
        if len(items) > self._queue_size:
            raise BatchTooLargeError(f"{len(items)} items came at once, grader.queue_size is {self._queue_size}")
        free = self._queue_size - len(self._queue)
        if len(items) > free:
            raise PoolBusyError(f"{len(items)} items came, the queue has room for {free} of {self._queue_size}")
        request = _Request(items)
        self._queue.add(request)
        for _ in range(min(len(items), len(self._idle))):
            self._idle.popleft().nudge.set()
        try:
            async with asyncio.timeout(MAX_WAIT_S):
                return await request.done
        except TimeoutError as error:
            raise PoolBusyError(f"no verdict within {MAX_WAIT_S:.0f} s: the queue is too long") from error

    async def explain(self, answer: str, golds: tuple[str, ...]) -> dict[str, Any] | None:
        """`explain.Explanation` by field name, made where hostile text may be read; None past the deadline."""
        return (await self.grade(Item(answer, golds, is_explanation=True))).explanation

    async def _slot(self) -> None:
        """Keep one worker alive for ever."""
        failures = 0
        while True:
            try:
                worker = await self._fork()
            except WorkerError as error:
                self._does_not_start(error)
                await asyncio.sleep(BACKOFF_S[min(failures, len(BACKOFF_S) - 1)])
                failures += 1
                continue
            failures, self._start_error = 0, None
            self._workers.add(worker)
            self._count_ready(+1)
            try:
                await self._serve(worker)
            finally:
                self._workers.discard(worker)
                self._count_ready(-1)
                await worker.kill()

    async def _fork(self) -> Worker:
        """A warm worker; a fork server too, when there is none."""
        async with self._forking:
            if self._server is None or self._server.is_lost:
                if self._server is not None:
                    await self._server.close()
                alarm_s = max(1, math.ceil(self._timeout_s) - 1)
                self._server = await ForkServer.start(
                    self._worker_module, memory_mb=self._memory_mb, timeout_s=self._timeout_s, alarm_s=alarm_s
                )
            worker = await self._server.fork()
        try:
            await worker.ready()
        except BaseException:
            await worker.kill()
            raise
        return worker

    async def _serve(self, worker: Worker) -> None:
        """Feed one worker until it must go."""
        for _ in range(self._max_items):
            job = await self._next(worker)
            if job is None:
                self._lost(worker, "crash")
                return
            try:
                outcome = await self._ask(worker, job.item)
            except WorkerError as error:
                cause = await self._cause(worker, error)
                self._lost(worker, cause)
                job.crashes += cause == "crash"
                self._crashes_in_a_row += cause == "crash"
                if self._crashes_in_a_row > MAX_CRASHES_IN_A_ROW:
                    job.request.refuse("the worker processes die on every item; the log of the grader says how")
                    await asyncio.sleep(BACKOFF_S[0])
                elif cause == "crash" and job.crashes < MAX_CRASHES:
                    self._queue.put_back(job)
                else:
                    job.request.settle(job.index, Outcome(Verdict.TIMEOUT, None, self._timeout_s * 1000.0))
                return
            except asyncio.CancelledError:
                job.request.refuse("the grader is shutting down")
                raise
            self._crashes_in_a_row = 0
            job.request.settle(job.index, outcome)
        _RECYCLED.inc()

    async def _next(self, worker: Worker) -> _Job | None:
        """The next job, or None when the idle worker dies first."""
        while not worker.is_lost:
            job = self._queue.pop()
            if job is not None:
                return job
            worker.nudge.clear()
            self._idle.append(worker)
            await worker.nudge.wait()
        if worker in self._idle:
            self._idle.remove(worker)
        return None

    async def _ask(self, worker: Worker, item: Item) -> Outcome:
        started = time.monotonic()
        try:
            question = {"answer": item.answer, "golds": item.golds, "explain": item.is_explanation}
            reply = await worker.ask(question, timeout_s=self._timeout_s)
        finally:
            _SECONDS.observe(time.monotonic() - started)
        if "failure" in reply:
            raise WorkerError(str(reply["failure"]))
        return Outcome(Verdict(reply["verdict"]), reply["method"], float(reply["elapsed_ms"]), reply.get("explanation"))

    async def _cause(self, worker: Worker, error: WorkerError) -> str:
        """Tell a worker that the kernel ended over its memory (`confinement`) from one that died otherwise."""
        is_crash = error.cause == "crash"
        status = await worker.kill(is_status_wanted=is_crash)
        return "memory" if is_crash and status == -signal.SIGSYS else error.cause

    def _does_not_start(self, error: WorkerError) -> None:
        self._start_error = (
            f"a worker process does not start ({error.__cause__ or error}): its reason is on standard error; "
            f"grader.worker_memory_mb is {self._memory_mb}"
        )
        log.error("worker does not start", extra={"reason": self._start_error})
        _FAILURES.labels("start").inc()

    def _lost(self, worker: Worker, cause: str) -> None:
        _FAILURES.labels(cause).inc()
        log.warning("worker lost", extra={"cause": cause, "worker_pid": worker.pid})

    def _count_ready(self, change: int) -> None:
        self._ready += change
        _READY.set(self._ready)
