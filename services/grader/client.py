"""The grader over HTTP, for any program that wants a verdict: asyncio (`GraderClient`) or plain (`SyncGraderClient`).

    async with GraderClient("http://127.0.0.1:8000") as grader:
        grade = await grader.grade(r"so it is \\boxed{0.5}", r"\\frac{1}{2}")      # grade.correct, grade.verdict, ...
        grades = await grader.grade_many([Question(r"\\boxed{4}", "4"), Question("no idea", "4")])

A grader that is away or busy is waited for until the deadline; what it never becomes is a verdict.

Concurrent `grade` calls share requests, without a timer. Up to MAX_REQUESTS requests are out at a time; a call that
finds one of those places free goes out at once, calls that find none gather, and leave together when one comes free.
An answer comes when its whole request is done, so an item that takes the grader's whole deadline (seconds) holds up
its neighbours: requests are therefore small (MAX_REQUEST_ITEMS), several are out, and one that is out for longer than
STALL_S gives its place to the next. (Simulated with 8 workers, 64 callers, every hundredth item slow for 2 s: as many
items/s as with a request for each item, nine of ten quick items within 35 ms. Without the stall rule two fifths fewer
items/s, and 2 s.) A request that fails is tried again in two halves, so an item that the grader cannot bear is soon
alone with its failure.

Nothing here needs the grader's own libraries.
"""

import asyncio
import json
import random
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, Self, TypeVar
from urllib.request import getproxies

import httpx
import msgspec

from services.contracts.config import secret_from_env
from services.contracts.telemetry import what_about
from services.contracts.tracing import HEADER, traceparent
from services.contracts.wire import Verdict
from services.grader.plain_http import PlainTransport

API_KEY_VARIABLE = "GRADER_API_KEY"
DEADLINE_S = 60.0  # of one item, retries included
REQUEST_TIMEOUT_S = 30.0  # of one try; the grader bounds its own work well below
FIRST_PAUSE_S, LAST_PAUSE_S, MAX_RETRY_AFTER_S = 0.05, 2.0, 30.0
CLOSE_TIMEOUT_S = 10.0
ABOUT_ONE_ITEM = (400, 413, 422)  # refusals that one item of several may have earned for all
MAX_REQUESTS = 4
MAX_REQUEST_ITEMS = 16
MAX_REQUEST_CHARS = 2_000_000  # JSON writes up to 12 bytes for a character; the grader takes 32 MiB
STALL_S = 0.1
MAX_CONNECTIONS = 64
BULK_ITEMS = 64  # in a request of grade_many: there nobody waits for one item

_T = TypeVar("_T")


class GraderError(RuntimeError):
    """The grader gave no verdict. Raised itself when what answered is no grader."""


class GraderUnavailableError(GraderError):
    """No answer within the deadline; the message names the last trouble. Try again later."""


class GraderRefusedError(GraderError):
    """The grader refuses the request (4xx); the message is its reason in one line. Trying again does not help."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(f"the grader refuses the request ({status}): {detail}")
        self.status = status
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Question:
    """One response to be graded against its gold answers, of which any is right."""

    response: str
    """The model's whole output."""
    gold: str | Sequence[str]
    """At least one."""
    extraction: Literal["boxed", "auto"] = "boxed"
    """boxed: the last closed box. auto: else the stated answer, else a bare last line."""
    id: str | None = None
    """Given back with the grade, and in the grader's log; by default the task that is under way (`telemetry.about`)."""


@dataclass(frozen=True, slots=True)
class Grade:
    """The grader's word on one response."""

    verdict: Verdict
    correct: bool
    extracted: str | None
    """The final answer as found; None when there is none."""
    method: str | None
    """The layer that decided: exact, numeric or symbolic."""
    elapsed_ms: float
    """The grader's time on it, queue time left out."""
    cached: bool
    id: str | None = None


class _Batch(msgspec.Struct):
    results: list[Grade]


_grade_decoder = msgspec.json.Decoder(Grade)
_batch_decoder = msgspec.json.Decoder(_Batch)


@dataclass(slots=True, eq=False)
class _Job:
    """A question on its way, and who waits for it. Done when graded, failed, or given up by its caller."""

    item: dict[str, object]
    num_chars: int
    traceparent: str  # of whoever asks; empty: it is not traced
    deadline_s: float  # what was asked for
    deadline: float  # on the monotonic clock
    future: asyncio.Future[Grade]
    trouble: str = "the grader has not answered yet"


@dataclass(slots=True)
class _Trouble:
    """Why a try failed although another may not; `retry_after_s` is the grader's wish."""

    reason: str
    retry_after_s: float = 0.0


@dataclass(slots=True)
class _Place:
    """One of the MAX_REQUESTS places, given back once: at the end, or when the request stalls."""

    on_free: Callable[[], None]
    is_free: bool = field(default=False)

    def free(self) -> None:
        if not self.is_free:
            self.is_free = True
            self.on_free()


class GraderClient:
    """Grades over HTTP, from one event loop. Use as an async context manager, or `close` it.

    token: bearer token; by default GRADER_API_KEY of the environment, or what is in the file that GRADER_API_KEY_FILE
    names. deadline_s: see `grade`.
    max_requests, max_request_items: see the module.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        deadline_s: float = DEADLINE_S,
        max_requests: int = MAX_REQUESTS,
        max_request_items: int = MAX_REQUEST_ITEMS,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        if httpx.URL(url).scheme not in ("http", "https"):
            raise ValueError(f"the grader's address begins with http:// or https://, got {url!r}")
        token = (secret_from_env(API_KEY_VARIABLE) if token is None else token).strip()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        limits = httpx.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=MAX_CONNECTIONS)
        transport = transport or _transport(url)
        self._http = httpx.AsyncClient(base_url=url, headers=headers, limits=limits, transport=transport)
        self._url, self._deadline_s = url, deadline_s
        self._max_requests, self._max_items = max_requests, max_request_items
        self._waiting: deque[_Job] = deque()
        self._num_busy = 0
        self._is_pump_due = self._is_closed = False
        self._deliveries: dict[asyncio.Task[None], Sequence[_Job]] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def grade(
        self,
        response: str,
        gold: str | Sequence[str],
        *,
        extraction: Literal["boxed", "auto"] = "boxed",
        id: str | None = None,
        deadline_s: float | None = None,
    ) -> Grade:
        """Grade one response; concurrent calls share requests.

        Raises GraderUnavailableError when there is no answer within `deadline_s` (by default the client's), retries
        included; GraderRefusedError for a malformed question or a wrong token; ValueError for one without gold.
        """
        job = self._job(Question(response, gold, extraction, id), deadline_s)
        self._waiting.append(job)
        self._pump_soon()
        return await self._outcome(job)

    async def grade_many(
        self, questions: Sequence[Question], *, on_progress: Callable[[int], object] | None = None
    ) -> list[Grade]:
        """Grade them all, in order, with MAX_REQUESTS requests of up to BULK_ITEMS out at a time.

        on_progress is called with the number graded so far. Raises as `grade` does, then for all of them; the
        deadline counts from the moment an item is sent.
        """
        grades: list[Grade] = []
        async for grade in self.grade_stream(questions):
            grades.append(grade)
            if on_progress:
                on_progress(len(grades))
        return grades

    async def grade_stream(self, questions: Iterable[Question]) -> AsyncIterator[Grade]:
        """Like `grade_many`, for any number of questions: they are taken as needed, and memory stays bounded."""
        chunks: deque[list[_Job]] = deque()
        source = iter(questions)
        try:
            while True:
                while len(chunks) < self._max_requests and (chunk := list(islice(source, BULK_ITEMS))):
                    jobs = deque(self._job(question) for question in chunk)
                    chunks.append(list(jobs))
                    while part := _take(jobs, BULK_ITEMS):
                        self._send(part)
                if not chunks:
                    return
                for job in chunks[0]:
                    yield await self._outcome(job)
                chunks.popleft()
        finally:
            for job in (job for jobs in chunks for job in jobs):
                if not job.future.cancel() and not job.future.cancelled():
                    job.future.exception()  # looked at: nobody else will

    async def close(self) -> None:
        """Close the connections; what is under way fails with GraderError."""
        self._is_closed = True
        deliveries = list(self._deliveries)
        for delivery in deliveries:
            delivery.cancel()
        await asyncio.gather(*deliveries, return_exceptions=True)
        _fail(self._waiting, GraderError("the grader client was closed"))
        await self._http.aclose()

    def _job(self, question: Question, deadline_s: float | None = None) -> _Job:
        if self._is_closed:
            raise GraderError("the grader client was closed")
        golds = [question.gold] if isinstance(question.gold, str) else list(question.gold)
        if not golds:
            raise ValueError("a question needs at least one gold answer")
        item: dict[str, object] = {"response": question.response, "gold": golds, "extraction": question.extraction}
        about = what_about("task_id")
        name = str(about) if question.id is None and about is not None else question.id
        if name is not None:
            item["id"] = name
        deadline_s = self._deadline_s if deadline_s is None else deadline_s
        return _Job(
            item,
            num_chars=len(question.response) + sum(map(len, golds)) + len(name or ""),
            traceparent=traceparent(),
            deadline_s=deadline_s,
            deadline=time.monotonic() + deadline_s,
            future=asyncio.get_running_loop().create_future(),
        )

    async def _outcome(self, job: _Job) -> Grade:
        """Wait for a job until its deadline. Leaving early, for whatever reason, gives up this job alone."""
        try:
            async with asyncio.timeout(job.deadline - time.monotonic()):
                return await job.future
        except TimeoutError as error:
            raise self._unavailable(job) from error

    def _pump_soon(self) -> None:
        """Once, after everything that is ready to run now: calls made in the same instant share a request."""
        if not self._is_pump_due:
            self._is_pump_due = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        """Send what waits while there are free places, evenly spread over them."""
        self._is_pump_due = False
        while self._num_busy < self._max_requests and not self._is_closed:
            free = self._max_requests - self._num_busy
            jobs = _take(self._waiting, min(self._max_items, -(-len(self._waiting) // free)))
            if not jobs:
                return
            self._num_busy += 1
            self._send(jobs, _Place(self._freed))

    def _freed(self) -> None:
        self._num_busy -= 1
        self._pump_soon()

    def _send(self, jobs: Sequence[_Job], place: _Place | None = None) -> None:
        delivery = asyncio.create_task(self._hold(jobs, place) if place else self._deliver(jobs, FIRST_PAUSE_S))
        self._deliveries[delivery] = jobs
        delivery.add_done_callback(self._delivered)

    def _delivered(self, delivery: asyncio.Task[None]) -> None:
        """Whatever ended a delivery, nobody waits for it any longer."""
        jobs = self._deliveries.pop(delivery)
        if delivery.cancelled():
            _fail(jobs, GraderError("the grader client was closed"))
        elif error := delivery.exception():
            _fail(jobs, error)

    async def _hold(self, jobs: Sequence[_Job], place: _Place) -> None:
        stall = asyncio.get_running_loop().call_later(STALL_S, place.free)
        try:
            await self._deliver(jobs, FIRST_PAUSE_S)
        finally:
            stall.cancel()
            place.free()

    async def _deliver(self, jobs: Sequence[_Job], pause_s: float) -> None:
        """Try until every job is done: graded, refused, given up by its caller, or past its deadline."""
        while jobs := [job for job in jobs if self._is_open(job)]:
            outcome = await self._try(jobs)
            if isinstance(outcome, _Trouble):
                for job in jobs:
                    job.trouble = outcome.reason
                left_s = max(job.deadline for job in jobs) - time.monotonic()
                await asyncio.sleep(min(left_s, max(outcome.retry_after_s, pause_s) * random.uniform(1.0, 1.5)))
            elif not isinstance(outcome, GraderError):
                for job, grade in zip(jobs, outcome, strict=True):
                    if not job.future.done():
                        job.future.set_result(grade)
                return
            elif len(jobs) == 1 or not (isinstance(outcome, GraderRefusedError) and outcome.status in ABOUT_ONE_ITEM):
                _fail(jobs, outcome)
                return
            pause_s = min(2 * pause_s, LAST_PAUSE_S)
            if len(jobs) > 1:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._deliver(jobs[: len(jobs) // 2], pause_s))
                    group.create_task(self._deliver(jobs[len(jobs) // 2 :], pause_s))
                return

    async def _try(self, jobs: Sequence[_Job]) -> Sequence[Grade] | GraderError | _Trouble:
        """One request."""
        items = [job.item for job in jobs]
        path, body = ("/v1/grade/batch", {"items": items}) if len(items) > 1 else ("/v1/grade", items[0])
        patience_s = max(0.0, min(REQUEST_TIMEOUT_S, max(job.deadline for job in jobs) - time.monotonic()))
        is_traced = any(job.traceparent for job in jobs)
        headers = {HEADER: ",".join(job.traceparent for job in jobs)} if is_traced else None
        try:
            # json escapes everything beyond ASCII, lone surrogates too: a response is model output
            reply = await self._http.post(path, content=json.dumps(body), headers=headers, timeout=patience_s)
        except httpx.RequestError as error:
            return _Trouble(f"{type(error).__name__} {error}".strip())
        if reply.is_server_error or reply.status_code == httpx.codes.TOO_MANY_REQUESTS:
            return _Trouble(f"{reply.status_code}: {_detail(reply)}", _retry_after_s(reply))
        return _grades(reply, len(items))

    def _is_open(self, job: _Job) -> bool:
        """Whether somebody still waits for it and there is time left."""
        if time.monotonic() >= job.deadline:
            _fail([job], self._unavailable(job))
        return not job.future.done()

    def _unavailable(self, job: _Job) -> GraderUnavailableError:
        return GraderUnavailableError(
            f"no verdict from the grader at {self._url} within {job.deadline_s:g} s, last trouble: {job.trouble}"
        )


class SyncGraderClient:
    """`GraderClient` for programs without asyncio, and for those that have a loop running already (notebooks).

    Takes the arguments of GraderClient. Its event loop runs in a thread of its own; calls from many threads share
    requests like concurrent tasks do. Not for use across a fork: make it in the process that uses it.
    """

    def __init__(self, url: str, **arguments: Any) -> None:
        self._client = GraderClient(url, **arguments)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="grader-client", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def grade(
        self,
        response: str,
        gold: str | Sequence[str],
        *,
        extraction: Literal["boxed", "auto"] = "boxed",
        id: str | None = None,
        deadline_s: float | None = None,
    ) -> Grade:
        """See GraderClient.grade."""
        return self._run(self._client.grade(response, gold, extraction=extraction, id=id, deadline_s=deadline_s))

    def grade_many(
        self, questions: Sequence[Question], *, on_progress: Callable[[int], object] | None = None
    ) -> list[Grade]:
        """See GraderClient.grade_many; on_progress is called from another thread."""
        return self._run(self._client.grade_many(questions, on_progress=on_progress))

    def close(self) -> None:
        """Close the connections and end the thread. Closing twice is fine."""
        if self._loop.is_closed():
            return
        self._run(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_TIMEOUT_S)
        self._loop.close()

    def _run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """Run on the client's loop; a caller that is interrupted gives up what it asked for."""
        if self._loop.is_closed():
            coroutine.close()
            raise GraderError("the grader client was closed")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()  # every coroutine run here has its own deadline
        finally:
            future.cancel()


def _transport(url: str) -> httpx.AsyncBaseTransport | None:
    """The cheaper one where it will do; None, which is httpx's own, for TLS and where the environment names a proxy."""
    needs_more = httpx.URL(url).scheme != "http" or getproxies().keys() & {"http", "all"}
    return None if needs_more else PlainTransport(max_connections=MAX_CONNECTIONS)


def _take(waiting: deque[_Job], limit: int) -> list[_Job]:
    """Take up to `limit` jobs whose callers still wait off the queue, not too long together."""
    jobs: list[_Job] = []
    num_chars = 0
    while waiting and len(jobs) < limit:
        num_chars += waiting[0].num_chars
        if jobs and num_chars > MAX_REQUEST_CHARS:
            break
        job = waiting.popleft()
        if not job.future.done():
            jobs.append(job)
    return jobs


def _fail(jobs: Iterable[_Job], error: BaseException) -> None:
    for job in jobs:
        if not job.future.done():
            job.future.set_exception(error)


def _detail(reply: httpx.Response) -> str:
    """The `detail` of a problem+json body in one line, or the beginning of whatever came."""
    try:
        problem = reply.json()
    except ValueError:  # a proxy's page
        problem = None
    detail = problem.get("detail") if isinstance(problem, dict) else None
    return " ".join(str(detail or reply.text[:200] or reply.reason_phrase).split())


def _retry_after_s(reply: httpx.Response) -> float:
    """Retry-After in seconds, 0 when there is none or it is a date."""
    value = reply.headers.get("Retry-After", "")
    return min(float(value), MAX_RETRY_AFTER_S) if value.isascii() and value.isdigit() else 0.0


def _grades(reply: httpx.Response, count: int) -> Sequence[Grade] | GraderError:
    if reply.is_client_error:
        return GraderRefusedError(reply.status_code, _detail(reply))
    if not reply.is_success:
        return GraderError(f"{reply.url} answers {reply.status_code}: is that the grader's address?")
    try:
        grades = _batch_decoder.decode(reply.content).results if count > 1 else [_grade_decoder.decode(reply.content)]
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        return GraderError(f"{reply.url} answers, but not like a grader: {error}")
    if len(grades) != count:
        return GraderError(f"{reply.url} answers {count} items with {len(grades)} results")
    return grades
