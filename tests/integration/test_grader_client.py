"""The client against the real service: results reach their callers, a killed grader is waited for, tokens."""

import asyncio
import random
from collections.abc import Iterator

import pytest
from live_grader import live_grader
from processes import free_port

from services.contracts.wire import Verdict
from services.grader.client import GraderClient, GraderRefusedError, Question, SyncGraderClient

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with live_grader() as url:
        yield url


async def ask(grader: GraderClient, n: int) -> bool:
    """Whether the caller of question n gets the answer to question n."""
    grade = await grader.grade(rf"so \boxed{{{n}.0}}", (str(n + n % 2),), id=str(n))
    return (grade.extracted, grade.id, grade.correct) == (f"{n}.0", str(n), n % 2 == 0)


@pytest.mark.parametrize("seed", range(3))
async def test_every_result_reaches_its_caller(url: str, seed: int) -> None:
    chance = random.Random(seed)

    async def caller(numbers: list[int]) -> list[bool]:
        results = []
        for n in numbers:
            await asyncio.sleep(chance.random() * 0.01)
            results.append(await ask(grader, n))
        return results

    async with GraderClient(url) as grader:
        callers = [caller([chance.randrange(1_000) for _ in range(8)]) for _ in range(64)]
        assert all(all(results) for results in await asyncio.gather(*callers))


async def test_a_grader_that_is_killed_is_waited_for_and_no_verdict_is_invented() -> None:
    port = free_port()
    with live_grader(port=port) as url:
        async with GraderClient(url) as grader:
            assert await ask(grader, 1)
    async with GraderClient(f"http://127.0.0.1:{port}") as grader:
        calls = [asyncio.create_task(ask(grader, n)) for n in range(100)]
        await asyncio.sleep(0.5)
        assert not any(call.done() for call in calls)
        with live_grader(port=port):
            async with asyncio.timeout(30):
                assert all(await asyncio.gather(*calls))


def test_many_questions_with_the_plain_client(url: str) -> None:
    questions = [Question(f"The answer is {n}.", [str(n), "-1"], "auto") for n in range(500)]
    progress: list[int] = []
    with SyncGraderClient(url) as grader:
        grades = grader.grade_many([*questions, Question("no idea", "4"), Question("\ud800", "$$")],
                                   on_progress=progress.append)  # fmt: skip
    assert [grade.extracted for grade in grades[:500]] == [str(n) for n in range(500)]
    assert all(grade.correct for grade in grades[:500]) and progress[-1] == 502
    assert [grade.verdict for grade in grades[500:]] == [Verdict.NO_ANSWER, Verdict.UNPARSABLE_GOLD]


def test_a_malformed_question_is_refused_with_the_services_reason(url: str) -> None:
    with SyncGraderClient(url) as grader, pytest.raises(GraderRefusedError, match="extraction") as caught:
        grader.grade("x", "2", extraction="all")  # type: ignore[arg-type]
    assert caught.value.status == 422 and "\n" not in str(caught.value)


def test_a_token_is_needed_where_the_grader_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRADER_API_KEY", raising=False)
    with live_grader(api_key="secret") as url:
        with SyncGraderClient(url) as grader, pytest.raises(GraderRefusedError) as caught:
            grader.grade("2", "2")
        assert caught.value.status == 401
        with SyncGraderClient(url, token="secret") as grader:
            assert grader.grade(r"\boxed{2}", "2").correct
        monkeypatch.setenv("GRADER_API_KEY", "secret")
        with SyncGraderClient(url) as grader:
            assert grader.grade(r"\boxed{2}", "2").correct
