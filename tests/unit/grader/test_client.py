"""The grader's client: trouble never becomes a verdict, calls share requests, every result reaches its caller."""

import asyncio
import json
import random
import threading
import time
from collections.abc import Awaitable, Callable

import httpx
import pytest

from services.contracts.telemetry import about
from services.contracts.wire import Verdict
from services.grader.client import (
    BULK_ITEMS,
    MAX_REQUEST_CHARS,
    MAX_REQUESTS,
    Grade,
    GraderClient,
    GraderError,
    GraderRefusedError,
    GraderUnavailableError,
    Question,
    SyncGraderClient,
)

Handler = Callable[[httpx.Request], Awaitable[httpx.Response]]


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRADER_API_KEY", raising=False)


def items_of(request: httpx.Request) -> list[dict[str, object]]:
    body = json.loads(request.content)
    return list(body["items"]) if request.url.path == "/v1/grade/batch" else [body]


def reply_to(request: httpx.Request) -> httpx.Response:
    """As a grader that finds the whole response to be the answer, and correct when it is the first gold."""
    results = [
        {"id": item.get("id"), "correct": item["response"] == item["gold"][0],  # type: ignore[index]
         "verdict": "correct" if item["response"] == item["gold"][0] else "incorrect",  # type: ignore[index]
         "extracted": item["response"].encode(errors="replace").decode(),  # type: ignore[attr-defined]
         "method": "exact", "elapsed_ms": 1.5, "cached": False, "new_field": 1}
        for item in items_of(request)
    ]  # fmt: skip
    return httpx.Response(200, json={"results": results} if request.url.path == "/v1/grade/batch" else results[0])


def problem(status: int, detail: str = "because", **headers: str) -> httpx.Response:
    return httpx.Response(status, json={"status": status, "detail": detail}, headers=headers)


class Script:
    """Plays its entries in turn, the last one for ever: a status, an error to raise, or a whole reply; 200 grades."""

    def __init__(self, *entries: int | Exception | httpx.Response) -> None:
        self.entries = list(entries)
        self.requests: list[httpx.Request] = []

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        entry = self.entries.pop(0) if len(self.entries) > 1 else self.entries[0]
        if isinstance(entry, Exception):
            raise entry
        if isinstance(entry, httpx.Response):
            return entry
        return reply_to(request) if entry == 200 else problem(entry)

    @property
    def sizes(self) -> list[int]:
        return [len(items_of(request)) for request in self.requests]


class Gate:
    """Holds every request until it is opened."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()
        self.requests: list[httpx.Request] = []

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        await self.opened.wait()
        return reply_to(request)

    @property
    def sizes(self) -> list[int]:
        return [len(items_of(request)) for request in self.requests]


def client(handler: Handler, **more: object) -> GraderClient:
    return GraderClient("http://grader", transport=httpx.MockTransport(handler), **more)  # type: ignore[arg-type]


async def settle() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


async def test_the_request_is_the_graders_contract():
    script = Script(200)
    async with client(script) as grader:
        grade = await grader.grade("3", ("2", "4"), id="a")
        await grader.grade("3", "3", extraction="auto")
    assert grade == Grade(Verdict.INCORRECT, False, "3", "exact", elapsed_ms=1.5, cached=False, id="a")
    first, second = script.requests
    assert (first.method, first.url.path, first.headers["content-type"]) == ("POST", "/v1/grade", "application/json")
    assert json.loads(first.content) == {"response": "3", "gold": ["2", "4"], "extraction": "boxed", "id": "a"}
    assert json.loads(second.content) == {"response": "3", "gold": ["3"], "extraction": "auto"}


async def test_a_question_bears_the_name_of_the_task_that_it_is_about_unless_it_has_one():
    script = Script(200)
    async with client(script) as grader:
        with about(task_id=7):
            assert (await grader.grade("3", "3")).id == "7"
            assert (await grader.grade("3", "3", id="mine")).id == "mine"
        assert (await grader.grade("3", "3")).id is None
    assert [items_of(request)[0].get("id") for request in script.requests] == ["7", "mine", None]


@pytest.mark.parametrize("trouble", [503, 500, 429, httpx.ConnectError("refused"), httpx.ReadTimeout("slow")])
async def test_trouble_is_tried_again_until_there_is_a_verdict(trouble):
    script = Script(trouble, trouble, 200)
    async with client(script) as grader:
        assert (await grader.grade("x", "2")).verdict is Verdict.INCORRECT
    assert len(script.requests) == 3


@pytest.mark.parametrize(("trouble", "says"), [(503, "503: because"), (httpx.ConnectError("refused"), "refused")])
async def test_past_the_deadline_there_is_no_verdict(trouble, says):
    script = Script(trouble)
    async with client(script, deadline_s=0.3) as grader:
        started = time.monotonic()
        with pytest.raises(GraderUnavailableError, match=rf"http://grader within 0\.3 s, last trouble: .*{says}"):
            await grader.grade("x", "2")
        assert time.monotonic() - started < 1
    assert 2 <= len(script.requests) <= 4  # it backs off


async def test_retry_after_is_honoured():
    script = Script(problem(503, **{"Retry-After": "1"}), 200)
    async with client(script) as grader:
        started = time.monotonic()
        await grader.grade("x", "2")
    assert 1.0 <= time.monotonic() - started < 3


async def test_one_try_may_not_outlast_the_deadline():
    script = Script(200)
    async with client(script) as grader:
        await grader.grade("x", "2", deadline_s=0.5)
    assert script.requests[0].extensions["timeout"]["read"] <= 0.5


async def test_every_item_keeps_its_own_deadline():
    gate = Gate()
    async with client(gate) as grader:
        patient = asyncio.create_task(grader.grade("x", "x"))
        with pytest.raises(GraderUnavailableError):
            await grader.grade("y", "y", deadline_s=0.05)
        gate.opened.set()
        assert (await patient).correct


async def test_a_refusal_carries_the_problems_detail_in_one_line():
    script = Script(problem(422, "body.gold:\n wrong"))
    async with client(script) as grader:
        with pytest.raises(GraderRefusedError, match=r"^the grader refuses the request \(422\): body.gold: wrong$"):
            await grader.grade("x", "2")
    assert len(script.requests) == 1


async def test_a_refused_item_takes_no_other_with_it():
    async def handler(request: httpx.Request) -> httpx.Response:
        bad = any(item["response"] == "13" for item in items_of(request))
        return problem(422) if bad else reply_to(request)

    async with client(handler, max_requests=1) as grader:
        outcomes = await asyncio.gather(*(grader.grade(str(n), str(n)) for n in range(16)), return_exceptions=True)
    assert isinstance(outcomes.pop(13), GraderRefusedError)
    assert all(isinstance(outcome, Grade) and outcome.correct for outcome in outcomes)


async def test_a_wrong_token_is_refused_without_more_requests():
    script = Script(401)
    async with client(script, max_requests=1) as grader:
        outcomes = await asyncio.gather(*(grader.grade(str(n), "2") for n in range(16)), return_exceptions=True)
    assert all(isinstance(outcome, GraderRefusedError) for outcome in outcomes)
    assert script.sizes == [16]


async def test_an_item_that_breaks_the_grader_breaks_only_itself():
    async def handler(request: httpx.Request) -> httpx.Response:
        if any(item["response"] == "3" for item in items_of(request)):
            raise httpx.ReadError("the grader died")
        return reply_to(request)

    async with client(handler, max_requests=1) as grader:
        outcomes = await asyncio.gather(
            *(grader.grade(str(n), str(n), deadline_s=2) for n in range(8)), return_exceptions=True
        )
    assert isinstance(outcomes.pop(3), GraderUnavailableError)
    assert all(isinstance(outcome, Grade) and outcome.correct for outcome in outcomes)


@pytest.mark.parametrize(
    "reply",
    [
        httpx.Response(200, json={"results": []}),
        httpx.Response(200, text="<html>hello</html>"),
        httpx.Response(200, content=b"\xff"),
        httpx.Response(200, json={**json.loads(reply_to(httpx.Request("POST", "http://g/v1/grade", json={
            "response": "1", "gold": ["1"]})).content), "verdict": "perhaps"}),
        httpx.Response(307, headers={"location": "/login"}),
    ],
    ids=["count", "page", "bytes", "verdict", "redirect"],
)  # fmt: skip
async def test_a_reply_that_is_no_graders_is_not_guessed_at(reply):
    async with client(Script(reply)) as grader:
        with pytest.raises(GraderError, match=r"^http://grader/v1/grade answers"):
            await grader.grade("x", "2")


async def test_a_lone_call_goes_at_once_and_calls_of_one_instant_spread_over_the_free_places():
    gate = Gate()
    async with client(gate, max_requests=4, max_request_items=16) as grader:
        first = asyncio.create_task(grader.grade("x", "x"))
        await settle()
        assert gate.sizes == [1]
        rest = [asyncio.create_task(grader.grade("x", "x")) for _ in range(9)]
        await settle()
        assert gate.sizes == [1, 3, 3, 3]
        gate.opened.set()
        assert all(grade.correct for grade in await asyncio.gather(first, *rest))


async def test_calls_that_find_no_place_leave_together_when_one_comes_free():
    gate = Gate()
    async with client(gate, max_requests=1, max_request_items=16) as grader:
        calls = [asyncio.create_task(grader.grade("x", "x"))]
        await settle()
        calls += [asyncio.create_task(grader.grade("x", "x")) for _ in range(20)]
        await settle()
        assert gate.sizes == [1]
        gate.opened.set()
        await asyncio.gather(*calls)
        assert gate.sizes == [1, 16, 4]


async def test_a_request_that_stalls_gives_its_place_to_the_next():
    slow = asyncio.Event()

    async def handler(request: httpx.Request) -> httpx.Response:
        if any(item["response"] == "slow" for item in items_of(request)):
            await slow.wait()
        return reply_to(request)

    async with client(handler, max_requests=1) as grader:
        stalled = asyncio.create_task(grader.grade("slow", "slow"))
        await settle()
        assert (await asyncio.wait_for(grader.grade("x", "x"), 1)).correct
        assert not stalled.done()
        slow.set()
        assert (await stalled).correct


async def test_long_responses_do_not_share_a_request_that_would_be_too_large():
    script = Script(200)
    async with client(script, max_requests=1) as grader:
        long = "x" * (MAX_REQUEST_CHARS // 2)
        await asyncio.gather(*(grader.grade(long, "2") for _ in range(3)), grader.grade("y", "2"))
        await grader.grade_many([Question(long, "2")] * 3)
    assert script.sizes == [1, 1, 2, 1, 1, 1]


async def test_a_caller_that_leaves_takes_no_other_with_it():
    gate = Gate()
    async with client(gate, max_requests=1) as grader:
        calls = [asyncio.create_task(grader.grade(str(n), str(n))) for n in range(4)]
        await settle()
        waiting = [asyncio.create_task(grader.grade(str(n), str(n))) for n in range(4, 8)]
        await settle()
        calls[1].cancel()
        waiting[2].cancel()
        gate.opened.set()
        outcomes = await asyncio.gather(*calls, *waiting, return_exceptions=True)
        assert [isinstance(outcome, Grade) and outcome.extracted for outcome in outcomes] == [
            "0", False, "2", "3", "4", "5", False, "7",
        ]  # fmt: skip
        assert gate.sizes == [4, 3]


@pytest.mark.parametrize("seed", range(12))
async def test_every_result_reaches_its_caller_in_any_interleaving(seed):
    chance = random.Random(seed)

    async def handler(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(chance.choice((0, 0, 0.001, 0.004)))
        fault = chance.random()
        if fault < 0.05:
            raise httpx.ReadError("lost")
        return problem(503) if fault < 0.1 else reply_to(request)

    async def caller(n: int) -> str:
        await asyncio.sleep(chance.random() * 0.02)
        call = asyncio.create_task(grader.grade(f"r{n}", f"r{n}" if n % 3 else "other", id=str(n)))
        if n % 7 == 0:
            await asyncio.sleep(chance.random() * 0.004)
            call.cancel()
        await asyncio.wait([call])
        if call.cancelled():
            return "cancelled" if n % 7 == 0 else "lost"
        grade = call.result()
        return "right" if (grade.extracted, grade.id, grade.correct) == (f"r{n}", str(n), n % 3 != 0) else "wrong"

    places = chance.randint(1, 6)
    async with client(handler, max_requests=places, max_request_items=chance.randint(1, 16)) as grader:
        outcomes = await asyncio.gather(*(caller(n) for n in range(150)))
    assert outcomes.count("right") >= 150 - 22 and set(outcomes) <= {"right", "cancelled"}


async def test_many_questions_keep_their_order_and_report_progress():
    async def handler(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(random.random() * 0.01)
        return reply_to(request)

    progress: list[int] = []
    questions = [Question(f"r{n}", f"r{n}", id=str(n)) for n in range(1_000)]
    async with client(handler) as grader:
        grades = await grader.grade_many(questions, on_progress=progress.append)
        assert await grader.grade_many([]) == []
    assert [grade.id for grade in grades] == [str(n) for n in range(1_000)] == [grade.extracted[1:] for grade in grades]
    assert progress == list(range(1, 1_001))


async def test_a_stream_takes_questions_only_as_it_needs_them():
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield Question(str(taken), str(taken))

    async with client(Script(200)) as grader:
        stream = grader.grade_stream(endless())
        grades = [await anext(stream) for _ in range(100)]
        await stream.aclose()
    assert [grade.extracted for grade in grades] == [str(n + 1) for n in range(100)]
    assert taken <= 100 + (MAX_REQUESTS + 1) * BULK_ITEMS


async def test_many_questions_fail_together_when_the_grader_is_away():
    async with client(Script(httpx.ConnectError("refused")), deadline_s=0.2) as grader:
        with pytest.raises(GraderUnavailableError, match="refused"):
            await grader.grade_many([Question("x", "2")] * 100)


async def test_a_closed_client_fails_what_is_under_way_and_takes_nothing_more():
    gate = Gate()
    grader = client(gate, max_requests=1)
    calls = [asyncio.create_task(grader.grade("x", "2")) for _ in range(20)]
    await settle()
    await grader.close()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(outcome, GraderError) for outcome in outcomes)
    with pytest.raises(GraderError, match="closed"):
        await grader.grade("x", "2")


@pytest.mark.parametrize(
    ("argument", "variable", "sent"),
    [(None, None, None), (None, "v\n", "Bearer v"), ("a", "v", "Bearer a"), ("", "v", None)],
)
async def test_the_token_is_the_argument_or_the_environments(monkeypatch, argument, variable, sent):
    if variable:
        monkeypatch.setenv("GRADER_API_KEY", variable)
    script = Script(200)
    async with client(script, token=argument) as grader:
        await grader.grade("x", "2")
    assert script.requests[0].headers.get("authorization") == sent


async def test_mistakes_of_the_caller_are_found_before_anything_is_sent():
    with pytest.raises(ValueError, match=r"http://.*'localhost:8000'"):
        GraderClient("localhost:8000")
    script = Script(200)
    async with client(script) as grader:
        with pytest.raises(ValueError, match="at least one gold"):
            await grader.grade("x", [])
    assert script.requests == []


async def test_model_output_that_is_no_valid_unicode_is_sent_all_the_same():
    script = Script(200)
    async with client(script) as grader:
        assert (await grader.grade("\ud800 é \0", "2")).verdict is Verdict.INCORRECT
    assert json.loads(script.requests[0].content)["response"] == "\ud800 é \0"


def test_the_plain_client_works_from_many_threads_and_inside_a_running_loop():
    script = Script(200)
    with SyncGraderClient("http://grader", transport=httpx.MockTransport(script)) as grader:
        grades: dict[int, Grade] = {}
        threads = [
            threading.Thread(target=lambda n=n: grades.update({n: grader.grade(str(n), str(n))})) for n in range(16)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert {n: grade.extracted for n, grade in grades.items()} == {n: str(n) for n in range(16)}

        async def inside() -> list[Grade]:
            return grader.grade_many([Question("1", "1"), Question("2", "1")])

        assert [grade.correct for grade in asyncio.run(inside())] == [True, False]
    grader.close()
    with pytest.raises(GraderError, match="closed"):
        grader.grade("x", "2")
