"""The pool with stub workers: deadlines, deaths, memory, turns and limits. Real processes, no mathematics."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from services.contracts.wire import Verdict
from services.grader.pool import MAX_CRASHES_IN_A_ROW, BatchTooLargeError, Item, Outcome, Pool, PoolBusyError

TIMEOUT_S = 0.6
SLACK_S = 0.5  # within which an item past its deadline is answered, and its worker replaced
MEMORY_MB = 512


@asynccontextmanager
async def pool_of(workers: int = 1, *, timeout_s: float = TIMEOUT_S, **settings: int) -> AsyncIterator[Pool]:
    pool = Pool(
        workers=workers,
        timeout_s=timeout_s,
        queue_size=settings.get("queue_size", 1_000),
        worker_memory_mb=settings.get("worker_memory_mb", MEMORY_MB),
        worker_max_items=settings.get("worker_max_items", 1_000),
        worker_module="tests.stub_worker",
    )
    await pool.start()
    try:
        await until(lambda: len(pool.worker_pids) == workers or pool.not_ready() not in (None, NOT_WARM))
        yield pool
    finally:
        await pool.close()


NOT_WARM = "no worker process is warm yet"


async def until(happened: Callable[[], bool], deadline_s: float = 20.0) -> None:
    async with asyncio.timeout(deadline_s):
        while not happened():
            await asyncio.sleep(0.005)


def item(answer: str) -> Item:
    return Item(answer, ("right",))


def lost(cause: str) -> float:
    return REGISTRY.get_sample_value("multiattempt_grader_worker_failures_total", {"cause": cause}) or 0.0


async def timed(pool: Pool, answer: str) -> tuple[Outcome, float]:
    started = time.monotonic()
    return await pool.grade(item(answer)), time.monotonic() - started


async def test_outcomes_come_in_the_order_of_the_items() -> None:
    async with pool_of(2) as pool:
        outcomes = await pool.grade_all([item("right"), item("sleep 0.1"), item("wrong"), item("right")])
    assert [outcome.verdict.value for outcome in outcomes] == ["correct", "incorrect", "incorrect", "correct"]
    assert outcomes[1].elapsed_ms >= 100 > outcomes[3].elapsed_ms


@pytest.mark.parametrize("answer", ["spin", "sleep 60"])
async def test_past_the_deadline_the_worker_is_killed_and_soon_replaced(answer: str) -> None:
    async with pool_of() as pool:
        before, [killed] = lost("deadline"), pool.worker_pids
        outcome, seconds = await timed(pool, answer)
        assert outcome.verdict is Verdict.TIMEOUT and TIMEOUT_S <= seconds < TIMEOUT_S + SLACK_S
        assert lost("deadline") == before + 1
        after, seconds = await timed(pool, "right")
        assert after.verdict is Verdict.CORRECT and seconds < SLACK_S
        assert pool.worker_pids != [killed]
        await until(lambda: not Path(f"/proc/{killed}").exists())


async def test_a_hanging_item_holds_up_no_other() -> None:
    async with pool_of(2) as pool:
        hanging = asyncio.create_task(pool.grade(item("spin")))
        await asyncio.sleep(0.02)
        _, seconds = await timed(pool, "right")
        assert seconds < TIMEOUT_S / 2 and not hanging.done()
        assert (await hanging).verdict is Verdict.TIMEOUT


@pytest.mark.parametrize("answer", [f"block {MEMORY_MB}", f"block {MEMORY_MB // 4}", f"grow {MEMORY_MB}", "raise"])
async def test_a_swallowed_memory_error_is_a_timeout_counted_as_memory(answer: str) -> None:
    async with pool_of(timeout_s=10.0) as pool:
        before, [killed] = lost("memory"), pool.worker_pids
        assert (await pool.grade(item(answer))).verdict is Verdict.TIMEOUT
        assert lost("memory") == before + 1
        assert (await pool.grade(item("right"))).verdict is Verdict.CORRECT
        assert killed not in pool.worker_pids


async def test_an_item_within_the_memory_limit_is_no_failure() -> None:
    async with pool_of() as pool:
        assert (await pool.grade(item(f"block {MEMORY_MB // 10}"))).verdict is Verdict.INCORRECT


@pytest.mark.parametrize("answer", ["exit", "bug"])
async def test_an_item_that_kills_its_worker_is_tried_twice_and_then_a_timeout(answer: str) -> None:
    async with pool_of() as pool:
        before = lost("crash")
        outcomes = await pool.grade_all([item(answer), item("right")])
        assert [outcome.verdict for outcome in outcomes] == [Verdict.TIMEOUT, Verdict.CORRECT]
        assert lost("crash") == before + 2


async def test_workers_that_die_on_every_item_are_no_verdict_on_the_items() -> None:
    async with pool_of(worker_max_items=1_000) as pool:
        outcomes = await asyncio.gather(*(pool.grade(item(f"exit {n}")) for n in range(20)), return_exceptions=True)
        assert isinstance(outcomes[-1], PoolBusyError) and "die on every item" in str(outcomes[-1])
        assert sum(isinstance(outcome, Outcome) for outcome in outcomes) <= MAX_CRASHES_IN_A_ROW
        assert (await pool.grade(item("right"))).verdict is Verdict.CORRECT  # and it goes on as soon as one lives


async def test_what_a_library_prints_does_not_come_between_the_frames() -> None:
    async with pool_of() as pool:
        assert (await pool.grade(item("print"))).verdict is Verdict.INCORRECT
        assert (await pool.grade(item("right"))).verdict is Verdict.CORRECT


async def test_a_worker_holds_no_descriptor_but_its_own() -> None:
    async with pool_of(3) as pool:  # standard three, its socket, its status, the listing itself
        assert {outcome.method for outcome in await pool.grade_all([item("descriptors")] * 12)} == {"exact"}


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSEGV])
async def test_killed_workers_are_replaced_and_no_item_is_lost(signal_number: signal.Signals) -> None:
    async with pool_of(2) as pool:
        grading = asyncio.create_task(pool.grade_all([item("sleep 0.01")] * 20 + [item("right")] * 20))
        await asyncio.sleep(0.05)
        for pid in pool.worker_pids:
            os.kill(pid, signal_number)
        assert [outcome.verdict for outcome in await grading] == [Verdict.INCORRECT] * 20 + [Verdict.CORRECT] * 20
        await until(lambda: len(pool.worker_pids) == 2)


async def test_a_killed_fork_server_is_replaced_and_no_item_is_lost() -> None:
    async with pool_of(2) as pool:
        killed, workers = pool.fork_server_pid, pool.worker_pids
        assert killed is not None
        grading = asyncio.create_task(pool.grade_all([item("sleep 0.01")] * 20 + [item("right")] * 20))
        await asyncio.sleep(0.05)
        os.kill(killed, signal.SIGKILL)
        assert [outcome.verdict for outcome in await grading] == [Verdict.INCORRECT] * 20 + [Verdict.CORRECT] * 20
        assert pool.fork_server_pid != killed
        await until(lambda: not any(Path(f"/proc/{pid}/fd/0").exists() for pid in workers))


async def test_a_stopped_fork_server_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.grader.fork_server.FORK_TIMEOUT_S", 0.5)
    async with pool_of(1) as pool:
        stopped = pool.fork_server_pid
        assert stopped is not None
        os.kill(stopped, signal.SIGSTOP)
        assert (await pool.grade(item("spin"))).verdict is Verdict.TIMEOUT
        assert (await pool.grade(item("right"))).verdict is Verdict.CORRECT
        assert pool.fork_server_pid != stopped


async def test_workers_are_recycled_and_no_zombie_is_left() -> None:
    async with pool_of(1, worker_max_items=3) as pool:
        seen = set()
        for _ in range(12):
            assert (await pool.grade(item("right"))).verdict is Verdict.CORRECT
            seen |= set(pool.worker_pids)
        assert len(seen) >= 3
        server = pool.fork_server_pid
        children = Path(f"/proc/{server}/task/{server}/children")
        await until(lambda: len(children.read_text().split()) == 1)


async def test_requests_take_turns() -> None:
    async with pool_of(1) as pool:
        large = asyncio.create_task(pool.grade_all([item("sleep 0.02")] * 40))
        await asyncio.sleep(0.03)
        _, seconds = await timed(pool, "right")
        assert seconds < 0.4 and not large.done()  # first come, first served would be 0.8 s
        assert len(await large) == 40


async def test_a_batch_is_queued_whole_or_not_at_all() -> None:
    async with pool_of(1, queue_size=10) as pool:
        first = asyncio.create_task(pool.grade_all([item("sleep 0.05")] * 8))
        await asyncio.sleep(0.02)
        with pytest.raises(PoolBusyError, match="5 items came, the queue has room for 3 of 10"):
            await pool.grade_all([item("right")] * 5)
        assert len(await pool.grade_all([item("right")] * 3)) == 3
        await first
        assert len(await pool.grade_all([item("right")] * 10)) == 10


async def test_a_batch_that_can_never_fit_is_no_matter_of_waiting() -> None:
    async with pool_of(1, queue_size=10) as pool:
        with pytest.raises(BatchTooLargeError, match=r"11 items came at once, grader\.queue_size is 10"):
            await pool.grade_all([item("right")] * 11)


async def test_what_its_caller_no_longer_wants_is_not_graded() -> None:
    async with pool_of(1) as pool:
        abandoned = asyncio.create_task(pool.grade_all([item("sleep 0.2")] * 50))
        await asyncio.sleep(0.02)
        abandoned.cancel()
        _, seconds = await timed(pool, "right")
        assert seconds < 1.0  # all of it would be 10 s


async def test_closing_refuses_what_waits_and_leaves_no_process() -> None:
    async with pool_of(2) as pool:
        grading = asyncio.create_task(pool.grade_all([item("sleep 0.3")] * 10))
        await asyncio.sleep(0.02)
        pids = [*pool.worker_pids, pool.fork_server_pid]
        await pool.close()
        with pytest.raises(PoolBusyError, match="shutting down"):
            await grading
        await until(lambda: not any(Path(f"/proc/{pid}/fd/0").exists() for pid in pids))


async def test_a_memory_limit_that_leaves_nothing_is_named_as_the_reason() -> None:
    async with pool_of(1, worker_memory_mb=64) as pool:
        assert "grader.worker_memory_mb is 64" in (pool.not_ready() or "")
        with pytest.raises(PoolBusyError, match=r"grader\.worker_memory_mb is 64"):
            await pool.grade(item("right"))


async def test_it_is_not_ready_until_a_worker_has_answered_an_item() -> None:
    pool = Pool(
        workers=1, timeout_s=1.0, queue_size=9, worker_memory_mb=MEMORY_MB, worker_max_items=9,
        worker_module="tests.stub_worker",
    )  # fmt: skip
    assert pool.not_ready() == NOT_WARM
    await pool.start()
    try:
        assert (await pool.grade(item("right"))).verdict is Verdict.CORRECT  # items may come before it is ready
        assert pool.not_ready() is None
    finally:
        await pool.close()
