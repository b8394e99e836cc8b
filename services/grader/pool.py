"""A fixed number of worker processes that can be killed, one item at a time each, behind one bounded queue.

The deadline of an item runs from the moment a worker gets it. Past it the worker is killed and replaced, and the item
is answered `timeout`; the other workers never notice. What equal means is `equivalence`'s business.
"""

import asyncio
import contextlib
import json
import logging
import math
import os
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

from services.contracts.wire import Verdict
from services.grader import frames

START_TIMEOUT_S = 60.0  # a worker imports sympy and warms up: half a second on an idle core
MAX_WAIT_S = 100.0  # in the queue; below the 120 s after which the trainers we serve give up
BACKOFF_S = (0.1, 0.5, 2.0, 5.0, 10.0)  # between attempts to start a worker

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


@dataclass(frozen=True, slots=True)
class Item:
    """One comparison: the extracted answer and the gold answers, any of which is right."""

    answer: str
    golds: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an item; `elapsed_ms` is the time in the worker, never queue time."""

    verdict: Verdict
    method: str | None
    elapsed_ms: float


@dataclass(slots=True)
class _Job:
    item: Item
    future: asyncio.Future[Outcome]
    crashes: int = field(default=0)


class _WorkerError(Exception):
    """The worker is of no more use; `cause` is the label it is counted under."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


class Pool:
    """Grades items on `workers` killable processes. Use it on one event loop: `start`, `grade`, `close`."""

    def __init__(
        self, *, workers: int, timeout_s: float, queue_size: int, worker_memory_mb: int, worker_max_items: int
    ) -> None:
        self._timeout_s = timeout_s
        self._memory_mb = worker_memory_mb
        self._max_items = worker_max_items
        self._queue: asyncio.Queue[_Job] = asyncio.Queue(queue_size)
        self._num_workers = workers
        self._slots: list[asyncio.Task[None]] = []
        self._processes: set[Process] = set()
        self._ready = 0
        self._start_error: str | None = None

    async def start(self) -> None:
        """Start the workers; returns at once, `not_ready` tells when they are warm."""
        self._slots = [asyncio.create_task(self._slot(), name=f"grader-slot-{i}") for i in range(self._num_workers)]

    async def close(self) -> None:
        """Kill the workers and fail what is still queued with PoolBusyError."""
        for slot in self._slots:
            slot.cancel()
        await asyncio.gather(*self._slots, return_exceptions=True)
        while not self._queue.empty():
            job = self._queue.get_nowait()
            if not job.future.done():
                job.future.set_exception(PoolBusyError("the grader is shutting down"))

    def not_ready(self) -> str | None:
        """Why the pool cannot grade now; None when at least one worker is warm."""
        if self._ready:
            return None
        return self._start_error or "no worker process is warm yet"

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the living workers."""
        return [process.pid for process in self._processes]

    async def grade(self, item: Item) -> Outcome:
        """Grade one item. Raises PoolBusyError."""
        return (await self.grade_all([item]))[0]

    async def grade_all(self, items: Sequence[Item]) -> list[Outcome]:
        """Grade items side by side, in order: all are queued, or none. Raises PoolBusyError."""
        if not items:
            return []
        if self._start_error and not self._ready:
            raise PoolBusyError(self._start_error)
        free = self._queue.maxsize - self._queue.qsize()
        if len(items) > free:
            raise PoolBusyError(f"{len(items)} items came, the queue has room for {free} of {self._queue.maxsize}")
        jobs = [_Job(item, asyncio.get_running_loop().create_future()) for item in items]
        for job in jobs:
            self._queue.put_nowait(job)
        _WAITING.set(self._queue.qsize())
        try:
            async with asyncio.timeout(MAX_WAIT_S):
                return list(await asyncio.gather(*(job.future for job in jobs)))
        except TimeoutError as error:
            raise PoolBusyError(f"no verdict within {MAX_WAIT_S:.0f} s: the queue is too long") from error

    async def _slot(self) -> None:
        """Keep one worker alive for ever; an item whose worker crashed is tried once more on the next."""
        carried: _Job | None = None
        failures = 0
        try:
            while True:
                worker = _Worker(self._processes)
                try:
                    if await self._warm(worker):
                        failures = 0
                        carried = await self._serve(worker, carried)
                    else:
                        await asyncio.sleep(BACKOFF_S[min(failures, len(BACKOFF_S) - 1)])
                        failures += 1
                finally:
                    self._count_ready(-worker.is_warm)
                    await worker.kill()
        finally:
            if carried is not None and not carried.future.done():
                carried.future.set_exception(PoolBusyError("the grader is shutting down"))

    async def _warm(self, worker: "_Worker") -> bool:
        try:
            await worker.start(memory_mb=self._memory_mb, alarm_s=max(1, math.ceil(self._timeout_s) - 1))
        except _WorkerError as error:
            self._start_error = (
                f"a worker process does not start ({error.__cause__ or error}): its reason is on standard error; "
                f"grader.worker_memory_mb is {self._memory_mb}"
            )
            log.error("worker does not start", extra={"reason": self._start_error})
            _FAILURES.labels("start").inc()
            return False
        self._start_error = None
        self._count_ready(+1)
        return True

    async def _serve(self, worker: "_Worker", carried: _Job | None) -> _Job | None:
        """Feed one worker until it must go; returns the item that its successor is to try again, if any."""
        for _ in range(self._max_items):
            job = carried or await self._next(worker)
            carried = None
            if job is None:
                self._lost(worker, "crash")
                return None
            if job.future.done():
                continue  # its caller has given up
            try:
                outcome = await self._ask(worker, job.item)
            except _WorkerError as error:
                self._lost(worker, error.cause)
                job.crashes += error.cause == "crash"
                if error.cause == "crash" and job.crashes < 2:
                    return job  # perhaps it was killed from outside, or was dead before the item came
                outcome = Outcome(Verdict.TIMEOUT, None, self._timeout_s * 1000.0)
            except asyncio.CancelledError:
                if not job.future.done():
                    job.future.set_exception(PoolBusyError("the grader is shutting down"))
                raise
            if not job.future.done():
                job.future.set_result(outcome)
            if worker.is_spent:
                return None
        _RECYCLED.inc()
        return None

    async def _next(self, worker: "_Worker") -> _Job | None:
        """The next item, or None when the idle worker dies first."""
        job = asyncio.create_task(self._queue.get())
        died = asyncio.create_task(worker.wait())
        try:
            await asyncio.wait({job, died}, return_when=asyncio.FIRST_COMPLETED)
            _WAITING.set(self._queue.qsize())
            return job.result() if job.done() else None
        finally:
            job.cancel()
            died.cancel()

    async def _ask(self, worker: "_Worker", item: Item) -> Outcome:
        started = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout_s):
                reply = await worker.ask({"answer": item.answer, "golds": item.golds})
        except TimeoutError as error:
            raise _WorkerError("deadline") from error
        finally:
            elapsed_s = time.monotonic() - started
            _SECONDS.observe(elapsed_s)
        if "failure" in reply:
            raise _WorkerError(str(reply["failure"]))
        return Outcome(Verdict(reply["verdict"]), reply["method"], elapsed_s * 1000.0)

    def _lost(self, worker: "_Worker", cause: str) -> None:
        worker.is_spent = True
        _FAILURES.labels(cause).inc()
        log.warning("worker lost", extra={"cause": cause, "worker_pid": worker.pid})

    def _count_ready(self, change: int) -> None:
        self._ready += change
        _READY.set(self._ready)


class _Worker:
    """One worker process and its two pipes. Its failures are _WorkerError."""

    def __init__(self, processes: set[Process]) -> None:
        self._processes = processes
        self._process: Process | None = None
        self.is_warm = False
        self.is_spent = False  # lost, or in an unknown state: never to be asked again

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def start(self, *, memory_mb: int, alarm_s: int) -> None:
        """Start the process and wait until it is warm."""
        flags = {"--memory-mb": memory_mb, "--alarm-s": alarm_s, "--parent": os.getpid()}
        arguments = [str(part) for flag in flags.items() for part in flag]
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", "services.grader.worker_process", *arguments,
                    stdin=PIPE, stdout=PIPE, env=_environment(), start_new_session=True,
                )  # fmt: skip
                self._processes.add(self._process)
                await self._read()
        except (TimeoutError, OSError) as error:
            raise _WorkerError("start") from error
        self.is_warm = True

    async def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send one item and wait for the reply; the caller keeps the clock."""
        assert self._process and self._process.stdin
        try:
            self._process.stdin.write(frames.encode(message))
            await self._process.stdin.drain()
        except ConnectionError as error:
            raise _WorkerError("crash") from error
        return await self._read()

    async def wait(self) -> None:
        """Return when the process has ended."""
        assert self._process
        await self._process.wait()

    async def kill(self) -> None:
        """SIGKILL, which a stopped or hanging process cannot resist, and reap."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it may have ended this instant
                process.kill()
        self._processes.discard(process)
        await process.wait()

    async def _read(self) -> dict[str, Any]:
        assert self._process and self._process.stdout
        try:
            head = await self._process.stdout.readexactly(frames.LENGTH.size)
            (length,) = frames.LENGTH.unpack(head)
            if length > frames.MAX_FRAME_BYTES:
                raise _WorkerError("crash")
            reply = json.loads(await self._process.stdout.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError, ValueError) as error:
            raise _WorkerError("crash") from error
        assert isinstance(reply, dict)
        return reply


def _environment() -> dict[str, str]:
    """What a worker needs and nothing else: no tokens reach the process that reads hostile text."""
    keep = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "HOME", "TMPDIR")
    root = str(Path(__file__).resolve().parents[2])
    return {name: os.environ[name] for name in keep if name in os.environ} | {
        "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "SYMPY_GROUND_TYPES": "python",  # SIGALRM is not delivered inside GMP
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
