"""The judge over a pool that counts what it is asked: what needs no worker, what is remembered, and what is not."""

import logging
from collections.abc import Sequence
from typing import Any, cast

import pytest

from services.contracts.wire import Verdict
from services.grader.answer import Extraction
from services.grader.app import _judged
from services.grader.judge import MAX_GOLD_CHARS, MAX_GOLDS, Judge, Question
from services.grader.pool import Item, Outcome, Pool, PoolBusyError
from services.grader.protocol import GradeRequest


class CountingPool:
    """Equal text is correct; `slow` times out."""

    def __init__(self) -> None:
        self.asked: list[Item] = []
        self.is_busy = False

    async def grade_all(self, items: Sequence[Item]) -> list[Outcome]:
        if self.is_busy:
            raise PoolBusyError("full")
        self.asked += items
        return [Outcome(self._verdict(item), "exact", 1.0) for item in items]

    def _verdict(self, item: Item) -> Verdict:
        if item.answer == "slow":
            return Verdict.TIMEOUT
        return Verdict.CORRECT if item.answer in item.golds else Verdict.INCORRECT


def judge_of(*, cache_items: int = 100) -> tuple[Judge, CountingPool]:
    pool = CountingPool()
    return Judge(cast(Pool, cast(Any, pool)), cache_items=cache_items), pool


def question(answer: str, *golds: str) -> Question:
    return Question(rf"So \boxed{{{answer}}}.", golds, Extraction.BOXED)


async def test_judgements_come_in_order_and_each_pair_is_asked_once() -> None:
    judge, pool = judge_of()
    found = await judge.judge([question("7", "7"), question("8", "7"), question("7", "7"), question("", "7")])
    assert [judgement.verdict.value for judgement in found] == ["correct", "incorrect", "correct", "no_answer"]
    assert pool.asked == [Item("7", ("7",)), Item("8", ("7",))]
    assert not any(judgement.is_cached for judgement in found)


async def test_a_known_comparison_needs_no_worker() -> None:
    judge, pool = judge_of()
    [first] = await judge.judge([question("7", "7")])
    [second] = await judge.judge([Question(r"By other words: \boxed{7}", ("7",), Extraction.AUTO)])
    assert (first.is_cached, second.is_cached) == (False, True)
    assert second.verdict is first.verdict and second.method == first.method and len(pool.asked) == 1


async def test_other_golds_are_another_comparison() -> None:
    judge, pool = judge_of()
    await judge.judge([question("7", "7"), question("7", "7", "8"), question("7", "8")])
    assert len(pool.asked) == 3


async def test_without_a_cache_nothing_is_remembered() -> None:
    judge, pool = judge_of(cache_items=0)
    for _ in range(2):
        [judgement] = await judge.judge([question("7", "7")])
        assert not judgement.is_cached
    assert len(pool.asked) == 2


async def test_the_least_recently_used_is_forgotten_first() -> None:
    judge, pool = judge_of(cache_items=2)
    for answer in ("1", "2", "1", "3", "1", "2"):
        await judge.judge([question(answer, "7")])
    assert [item.answer for item in pool.asked] == ["1", "2", "3", "2"]


@pytest.mark.parametrize("answer", ["slow", "7" * 1_001])
async def test_timeouts_and_long_items_are_not_remembered(answer: str) -> None:
    judge, pool = judge_of()
    for _ in range(2):
        await judge.judge([question(answer, "7")])
    assert len(pool.asked) == 2


@pytest.mark.parametrize("golds", [(), ("",), ("  $$ ",), (r"\boxed{}",), ("7" * (MAX_GOLD_CHARS + 1),)])
async def test_no_gold_that_can_be_read_is_never_incorrect(golds: tuple[str, ...]) -> None:
    judge, pool = judge_of()
    [judgement] = await judge.judge([question("7", *golds)])
    assert judgement.verdict is Verdict.UNPARSABLE_GOLD and not judgement.is_correct and not pool.asked


async def test_golds_beyond_the_limit_are_not_looked_at() -> None:
    judge, pool = judge_of()
    await judge.judge([question("7", *map(str, range(100, 100 + 2 * MAX_GOLDS)))])
    assert len(pool.asked[0].golds) == MAX_GOLDS


async def test_a_full_queue_refuses_the_whole_request_and_leaves_no_trace() -> None:
    judge, pool = judge_of()
    pool.is_busy = True
    with pytest.raises(PoolBusyError):
        await judge.judge([question("7", "7"), question("8", "7")])
    pool.is_busy = False
    [judgement] = await judge.judge([question("7", "7")])
    assert judgement.is_correct and not judgement.is_cached


async def test_an_answer_that_took_too_long_is_in_the_log_under_its_name(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="services.grader")  # `multiattempt grade` wants less of it
    judge = Judge(cast(Pool, CountingPool()), cache_items=0)
    requests = [
        GradeRequest(response="\\boxed{slow}", gold="1", id="7" * 100),
        GradeRequest(response="\\boxed{1}", gold="1", id="8"),
    ]
    await _judged(judge, requests, "")
    [record] = caplog.records
    assert (record.msg, vars(record)["id"]) == ("not compared in time", "7" * 64)
