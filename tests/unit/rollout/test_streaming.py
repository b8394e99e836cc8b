"""A dialogue's stream: what it sends, when it gives up, and what a client learns of a failure."""

import asyncio
import json

import pytest
from fastapi import HTTPException

from services.contracts.wire import Verdict
from services.grader.client import GraderUnavailableError
from services.rollout.streaming import EventStream, People, unless


class Client:
    """The far end of a connection. reads_after: it takes nothing more after so many messages."""

    def __init__(self, *, reads: int = 1000) -> None:
        self.messages: list[dict] = []
        self.gone = asyncio.Event()
        self._reads = reads

    async def receive(self) -> dict:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict) -> None:
        if len(self.messages) == self._reads:
            await asyncio.Event().wait()
        self.messages.append(message)

    @property
    def events(self) -> list[tuple[str, dict]]:
        text = b"".join(message.get("body", b"") for message in self.messages).decode()
        lines = [line for line in text.splitlines() if line]
        names, data = lines[::2], lines[1::2]
        return [
            (name.removeprefix("event: "), json.loads(one.removeprefix("data: ")))
            for name, one in zip(names, data, strict=True)
        ]


class Work:
    """Emits one event, then waits for its gate, then returns or raises."""

    def __init__(self, *, fails: Exception | None = None, is_silent: bool = False) -> None:
        self.gate, self.fails, self.is_silent = asyncio.Event(), fails, is_silent
        self.was_cancelled = False

    async def __call__(self, emit) -> dict:
        if not self.is_silent:
            emit("prompt", {"text": "a\u2028b\nc"})
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
        if self.fails:
            raise self.fails
        return {"reward": 1.0}


async def stream(work: Work, client: Client, *, send_timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(5):
        await EventStream(work, send_timeout_s=send_timeout_s)({}, client.receive, client.send)


async def test_events_come_one_by_one_and_the_result_last() -> None:
    work, client = Work(), Client()
    work.gate.set()
    await stream(work, client)
    assert client.events == [("prompt", {"text": "a\u2028b\nc"}), ("result", {"reward": 1.0})]
    assert [message.get("more_body") for message in client.messages] == [None, True, False]


async def test_what_fails_before_the_first_event_is_the_answers_status() -> None:
    work, client = Work(fails=HTTPException(422, "too long"), is_silent=True), Client()
    work.gate.set()
    with pytest.raises(HTTPException, match="too long"):
        await stream(work, client)
    assert client.messages == []


async def test_what_fails_later_is_an_event() -> None:
    work, client = Work(fails=HTTPException(503, "no grader")), Client()
    work.gate.set()
    await stream(work, client)
    name, problem = client.events[-1]
    assert (name, problem["status"], problem["detail"]) == ("error", 503, "no grader")


async def test_a_bug_is_told_without_its_words_and_raised_for_the_log() -> None:
    work, client = Work(fails=KeyError("secret")), Client()
    work.gate.set()
    with pytest.raises(KeyError):
        await stream(work, client)
    name, problem = client.events[-1]
    assert (name, problem["status"]) == ("error", 500) and "secret" not in problem["detail"]
    assert client.messages[-1]["more_body"] is False


async def test_a_client_that_hangs_up_ends_the_work() -> None:
    work, client = Work(), Client()
    streaming = asyncio.create_task(stream(work, client))
    await asyncio.sleep(0.01)
    client.gone.set()
    await streaming
    assert work.was_cancelled


@pytest.mark.parametrize("reads", [0, 1])
async def test_a_client_that_reads_nothing_ends_the_work(reads: int) -> None:
    work, client = Work(), Client(reads=reads)
    await stream(work, client, send_timeout_s=0.01)
    assert work.was_cancelled and len(client.messages) == reads


async def test_work_is_given_up_for_what_ends_it_and_otherwise_left_alone() -> None:
    end, work = asyncio.Event(), Work()
    waiting = asyncio.create_task(unless(end.wait(), work(lambda *_: None), HTTPException(503, "stopping")))
    await asyncio.sleep(0.01)
    end.set()
    with pytest.raises(HTTPException, match="stopping"):
        await waiting
    assert work.was_cancelled
    assert await unless(asyncio.Event().wait(), asyncio.sleep(0, "done"), HTTPException(503)) == "done"


async def test_a_verdict_is_for_one_attempt_once_and_nobody_is_waited_for_for_ever() -> None:
    people, names = People(patience_s=0.05), list[str]()
    asking = asyncio.create_task(people.ask(names.append))
    await asyncio.sleep(0)
    assert people.answer(names[0], Verdict.CORRECT) and not people.answer(names[0], Verdict.INCORRECT)
    assert await asking is Verdict.CORRECT and not people.answer(names[0], Verdict.CORRECT)
    with pytest.raises(GraderUnavailableError, match="nobody gave a verdict"):
        await people.ask(names.append)
    assert not people.answer(names[1], Verdict.CORRECT)


@pytest.mark.parametrize("num_events", range(1, 8))
async def test_a_client_that_hangs_up_just_when_an_event_comes_is_not_missed(num_events: int) -> None:
    client, is_over = Client(), False

    async def work(emit) -> dict:
        nonlocal is_over
        try:
            for number in range(10**9):
                emit("text", {"text": "x"})
                if number == num_events:
                    client.gone.set()
                await asyncio.sleep(0)
        finally:
            is_over = True
        return {}

    async with asyncio.timeout(5):
        await EventStream(work)({}, client.receive, client.send)
    assert is_over
