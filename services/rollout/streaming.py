"""A dialogue as server-sent events: it runs while its client reads, and ends when the client hangs up."""

import asyncio
import secrets
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from fastapi import HTTPException, Response
from starlette.types import Message, Receive, Scope, Send

from services.contracts.web import problem_body
from services.contracts.wire import Verdict
from services.grader.client import Grade, GraderUnavailableError
from services.rollout.protocol import server_sent_event

CLIENT_GONE = 499  # nobody reads this answer; it is for logs and counters
HEARTBEAT_S = 10.0
SEND_TIMEOUT_S = 60.0

Emit = Callable[[str, dict[str, Any]], None]  # an event's name and data

_T = TypeVar("_T")


class EventStream(Response):
    """Runs `work` and sends what it emits, then its `result`. What fails before the first event has its own status.

    work: raises HTTPException for what the client is to be told; anything else is a bug, told as such and raised.
    send_timeout_s: a client that takes nothing for so long has gone.
    """

    media_type = "text/event-stream"

    def __init__(
        self, work: Callable[[Emit], Coroutine[Any, Any, dict[str, Any]]], *, send_timeout_s: float = SEND_TIMEOUT_S
    ) -> None:
        self._work, self._send_timeout_s = work, send_timeout_s
        self.status_code, self.background = 200, None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all of it, or stop because nobody listens."""
        try:
            await while_connected(receive, self._stream(send))
        except HTTPException as error:
            if error.status_code != CLIENT_GONE:
                raise

    async def _stream(self, send: Send) -> None:
        events: asyncio.Queue[bytes | None] = asyncio.Queue()  # no longer than one dialogue

        def emit(name: str, data: dict[str, Any]) -> None:
            events.put_nowait(server_sent_event(name, data))

        async def put(body: bytes, *, more: bool = True) -> None:
            await self._deliver(send, {"type": "http.response.body", "body": body, "more_body": more})

        working = asyncio.create_task(self._work(emit))
        working.add_done_callback(lambda _: events.put_nowait(None))
        try:
            event = await events.get()
            if event is None:
                working.result()  # it failed before it began: the status says so
            start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            await self._deliver(send, start)
            while event is not None:
                await put(event)
                try:
                    async with asyncio.timeout(HEARTBEAT_S):  # `wait_for` may miss a cancellation when an event comes
                        event = await events.get()
                except TimeoutError:
                    event = b": still here\n\n"
            try:
                last = server_sent_event("result", working.result())
            except HTTPException as error:
                last = server_sent_event("error", problem_body(error.status_code, str(error.detail)))
            except Exception as error:
                failed = f"the replica failed ({type(error).__name__}); its log says where"
                await put(server_sent_event("error", problem_body(500, failed)), more=False)
                raise
            await put(last, more=False)
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)

    async def _deliver(self, send: Send, message: Message) -> None:
        try:
            async with asyncio.timeout(self._send_timeout_s):
                await send(message)
        except TimeoutError as error:
            raise HTTPException(CLIENT_GONE, "the client reads nothing") from error


async def unless(ends: Coroutine[Any, Any, Any], work: Coroutine[Any, Any, _T], refusal: HTTPException) -> _T:
    """Await `work`, but cancel it and raise `refusal` when `ends` does so first."""
    working, ending = asyncio.ensure_future(work), asyncio.ensure_future(ends)
    try:
        await asyncio.wait((working, ending), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise refusal
        return working.result()
    finally:
        for future in (working, ending):
            future.cancel()
        await asyncio.gather(working, ending, return_exceptions=True)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """Await `work`, but cancel it when the client hangs up: FastAPI would let it run, and the engine sample, on.

    Raises HTTPException CLIENT_GONE then.
    """
    return await unless(_left(receive), work, HTTPException(CLIENT_GONE, "the client hung up"))


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class People:
    """The attempts that wait for a person's verdict, each under a name that cannot be guessed."""

    def __init__(self, *, patience_s: float) -> None:
        self._patience_s = patience_s
        self._waiting: dict[str, asyncio.Future[Verdict]] = {}

    def answer(self, name: str, verdict: Verdict) -> bool:
        """Give the verdict; False when nothing of that name waits."""
        waiting = self._waiting.get(name)
        if waiting is None or waiting.done():
            return False
        waiting.set_result(verdict)
        return True

    async def ask(self, put_question: Callable[[str], None]) -> Verdict:
        """Put the question under a new name and wait. Raises GraderUnavailableError when nobody answers in time."""
        name = secrets.token_urlsafe(16)
        waiting: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        self._waiting[name] = waiting
        try:
            put_question(name)
            async with asyncio.timeout(self._patience_s):
                return await waiting
        except TimeoutError as error:
            raise GraderUnavailableError(f"nobody gave a verdict within {self._patience_s:g} s") from error
        finally:
            del self._waiting[name]


class PersonAsGrader:
    """A runner's grader that asks whoever reads the stream."""

    def __init__(self, people: People, put_question: Callable[[str], None]) -> None:
        self._people, self._put_question = people, put_question

    async def grade(self, response: str, gold: tuple[str, ...]) -> Grade:
        """Wait for the verdict. Raises GraderUnavailableError."""
        started = time.monotonic()
        verdict = await self._people.ask(self._put_question)
        elapsed_ms = 1000 * (time.monotonic() - started)
        return Grade(verdict, verdict is Verdict.CORRECT, None, None, elapsed_ms=elapsed_ms, cached=False)
