"""A grader that is away or busy is waited for until the deadline; it never becomes a verdict."""

import json
import time

import httpx
import pytest

from services.contracts.wire import Verdict
from services.rollout.grader_client import Grade, GraderUnavailable, HttpGrader

ANSWER = {"id": None, "correct": False, "verdict": "incorrect", "extracted": "3", "method": "exact", "elapsed_ms": 1.5,
          "cached": False}  # fmt: skip


class ScriptedTransport(httpx.AsyncBaseTransport):
    """Answers in turn with a status code, or raises; the last entry goes on for ever."""

    def __init__(self, *script: int | Exception) -> None:
        self.script = list(script)
        self.requests: list[httpx.Request] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        entry = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(entry, Exception):
            raise entry
        return httpx.Response(entry, json=ANSWER, request=request)


def make_grader(*script: int | Exception, timeout_s: float = 5.0) -> tuple[HttpGrader, ScriptedTransport]:
    transport = ScriptedTransport(*script)
    return HttpGrader("http://grader", timeout_s=timeout_s, transport=transport), transport


async def test_the_request_is_the_graders_contract():
    grader, transport = make_grader(200)
    assert await grader.grade("\\boxed{3}", ("2", "4")) == Grade(Verdict.INCORRECT, "3", 1.5)
    [request] = transport.requests
    assert (request.method, request.url.path) == ("POST", "/v1/grade")
    assert json.loads(request.content) == {"response": "\\boxed{3}", "gold": ["2", "4"], "extraction": "boxed"}
    await grader.close()


@pytest.mark.parametrize("trouble", [503, 500, 429, httpx.ConnectError("refused"), httpx.ReadTimeout("slow")])
async def test_trouble_is_tried_again_until_there_is_a_verdict(trouble):
    grader, transport = make_grader(trouble, trouble, 200)
    assert (await grader.grade("x", ("2",))).verdict is Verdict.INCORRECT
    assert len(transport.requests) == 3


@pytest.mark.parametrize("trouble", [503, httpx.ConnectError("refused")])
async def test_past_the_deadline_there_is_no_verdict(trouble):
    grader, transport = make_grader(trouble, timeout_s=0.3)
    started = time.monotonic()
    with pytest.raises(GraderUnavailable, match=r"no verdict within 0\.3 s"):
        await grader.grade("x", ("2",))
    assert time.monotonic() - started < 2
    assert 2 <= len(transport.requests) <= 4  # it backs off


async def test_one_try_may_not_outlast_the_deadline():
    grader, transport = make_grader(200, timeout_s=0.5)
    await grader.grade("x", ("2",))
    assert transport.requests[0].extensions["timeout"]["read"] <= 0.5


async def test_a_request_that_the_grader_refuses_is_a_bug_of_ours():
    grader, transport = make_grader(422)
    with pytest.raises(httpx.HTTPStatusError):
        await grader.grade("x", ("2",))
    assert len(transport.requests) == 1


async def test_an_unknown_verdict_is_not_guessed_at(monkeypatch):
    monkeypatch.setitem(ANSWER, "verdict", "perhaps")
    grader, _ = make_grader(200)
    with pytest.raises(ValueError, match="perhaps"):
        await grader.grade("x", ("2",))
