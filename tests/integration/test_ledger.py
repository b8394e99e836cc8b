"""The ledger against a real Valkey: who may hold what, and what survives which crash."""

import asyncio

import numpy as np
import pytest
from redis.asyncio import Redis

from services.contracts.books import STALE
from services.contracts.ledger import Claim, Depth, Ledger
from services.contracts.store import connect
from services.contracts.valkey import EmbeddedValkey
from services.contracts.wire import (
    Attempt,
    FinishReason,
    Progress,
    Task,
    Timings,
    Trajectory,
    Verdict,
    VersionSpan,
    WireError,
    encode,
)

pytestmark = pytest.mark.integration

LEASE_S = 0.4  # long enough that a busy machine does not expire one by accident
EXPIRY_S = LEASE_S * 1.5  # a lease, and the quarter of it that an expired one may stay unseen
MAX_DELIVERIES = 3


def task(task_id: int, *, batch: int = 0, min_version: int = 0) -> Task:
    return Task(
        task_id=task_id,
        batch=batch,
        problem="1+1",
        gold=("2",),
        max_attempts=2,
        seed=task_id,
        min_version=min_version,
    )


def trajectory(of: Task, *, replica_id: str = "a") -> Trajectory:
    return Trajectory(
        task_id=of.task_id,
        batch=of.batch,
        token_ids=np.array([5, 6, 7], dtype=np.int32),
        action_mask=np.array([False, True, True]),
        logprobs=np.array([np.nan, -0.5, -1.0], dtype=np.float32),
        versions=(VersionSpan(0, 1, 3),),
        attempts=(Attempt(start=1, end=3, extracted="2", verdict=Verdict.CORRECT, grading_ms=1.0),),
        max_attempts=of.max_attempts,
        reward=1.0,
        finish_reason=FinishReason.SOLVED,
        replica_id=replica_id,
        timings=Timings(generate_s=0.1, grade_s=0.1, total_s=0.2),
    )


def progress(task_id: int, *, attempts: int = 1) -> Progress:
    """A prompt token, then attempts of two tokens with a token of feedback after each."""
    length = 1 + 3 * attempts
    token_ids = np.arange(10, 10 + length, dtype=np.int32)
    logprobs = -token_ids.astype(np.float32) / 3
    logprobs[::3] = np.nan
    spans = [(1 + 3 * i, 3 + 3 * i) for i in range(attempts)]
    return Progress(
        task_id=task_id,
        token_ids=token_ids,
        logprobs=logprobs,
        versions=tuple(VersionSpan(i, start, end) for i, (start, end) in enumerate(spans)),
        attempts=tuple(
            Attempt(start=start, end=end, extracted="3", verdict=Verdict.INCORRECT, grading_ms=1.0)
            for start, end in spans
        ),
        timings=Timings(generate_s=0.1, grade_s=0.1, total_s=0.2),
    )


def same(a: Progress | None, b: Progress) -> bool:
    """Byte for byte."""
    return a is not None and encode(a) == encode(b)


def make_ledger(redis: Redis) -> Ledger:
    return Ledger(redis, run="test", lease_s=LEASE_S, max_deliveries=MAX_DELIVERIES)


@pytest.fixture
async def ledger(redis: Redis) -> Ledger:
    ledger = make_ledger(redis)
    await ledger.open()
    return ledger


async def issue(ledger: Ledger, n: int, *, batch: int = 0, min_version: int = 0) -> int:
    first = await ledger.next_task()
    return await ledger.issue(first, [task(first + i, batch=batch, min_version=min_version) for i in range(n)])


async def finish(ledger: Ledger, n: int) -> None:
    for claim in await ledger.claim("a", 0, n):
        assert await ledger.complete(claim.entry_id, trajectory(claim.task))


def ids(claims: list[Claim]) -> list[int]:
    return [claim.task.task_id for claim in claims]


# Issuing


async def test_issuing_twice_from_the_same_counter_issues_once(ledger: Ledger) -> None:
    tasks = [task(0), task(1)]
    assert await ledger.issue(0, tasks) == 2
    assert await ledger.issue(0, tasks) == 2
    assert (await ledger.live(), (await ledger.depth()).waiting) == ({0: 2}, 2)


async def test_concurrent_issuers_issue_each_task_once(ledger: Ledger) -> None:
    await asyncio.gather(*(ledger.issue(0, [task(i) for i in range(5)]) for _ in range(10)))
    assert ids(await ledger.claim("a", 0, 100)) == [0, 1, 2, 3, 4]


async def test_tasks_must_be_numbered_from_the_counter(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="numbered"):
        await ledger.issue(0, [task(0), task(2)])


async def test_live_counts_each_batch_apart(ledger: Ledger) -> None:
    await issue(ledger, 3, batch=4)
    await issue(ledger, 2, batch=5)
    assert await ledger.live() == {4: 3, 5: 2}


async def test_opening_again_changes_nothing(ledger: Ledger) -> None:
    await issue(ledger, 2)
    await ledger.claim("a", 0, 1)
    await ledger.open()
    assert await ledger.depth() == Depth(1, 1, 0, 0, 0)


async def test_reconciling_moves_the_counter_forward_and_never_back(ledger: Ledger) -> None:
    for counter in (10, 3):
        await ledger.reconcile(counter, 0, forget=[], gone={})
        assert await ledger.next_task() == 10
    assert await ledger.issue(10, [task(10)]) == 11


# Claiming


async def test_claimers_never_share_a_task(ledger: Ledger) -> None:
    await issue(ledger, 60)
    claims = await asyncio.gather(*(ledger.claim(name, 0, 4) for name in "abcdefghijklmno"))
    assert sorted(task_id for claimed in claims for task_id in ids(claimed)) == list(range(60))
    assert await ledger.claim("p", 0, 4) == []


async def test_a_claim_is_the_task_that_was_issued(ledger: Ledger) -> None:
    await issue(ledger, 1, batch=2)
    assert await ledger.claim("a", 0, 8) == [Claim(task(0, batch=2), "1-0", 1)]


async def test_an_expired_lease_goes_to_another_claimer(ledger: Ledger) -> None:
    await issue(ledger, 1)
    await ledger.claim("a", 0, 1)
    assert await ledger.claim("b", 0, 1) == []
    await asyncio.sleep(EXPIRY_S)
    assert await ledger.claim("b", 0, 1) == [Claim(task(0), "1-0", 2)]
    assert await ledger.renew("a", ["1-0"]) == []  # it is no longer a's
    assert await ledger.renew("b", ["1-0"]) == ["1-0"]


async def test_a_renewed_lease_does_not_expire(ledger: Ledger) -> None:
    await issue(ledger, 1)
    await ledger.claim("a", 0, 1)
    for _ in range(8):
        await asyncio.sleep(EXPIRY_S / 4)
        assert await ledger.renew("a", ["1-0"]) == ["1-0"]
        assert await ledger.claim("b", 0, 1) == []


async def test_renewing_is_no_delivery(ledger: Ledger) -> None:
    await issue(ledger, 1)
    await ledger.claim("a", 0, 1)
    for _ in range(5):
        await ledger.renew("a", ["1-0"])
    await ledger.release("a", "1-0", has_failed=True)
    assert [claim.deliveries for claim in await ledger.claim("b", 0, 1)] == [2]


async def test_claims_right_after_one_another_find_all_expired_leases(ledger: Ledger) -> None:
    await issue(ledger, 10)
    await ledger.claim("a", 0, 10)
    await asyncio.sleep(EXPIRY_S)
    assert ids(await ledger.claim("b", 0, 4) + await ledger.claim("b", 0, 4) + await ledger.claim("b", 0, 4)) == [
        *range(10)
    ]


async def test_a_released_task_goes_to_the_next_claimer_at_once(ledger: Ledger) -> None:
    await issue(ledger, 2)
    await ledger.claim("a", 0, 1)
    assert not await ledger.release("b", "1-0", has_failed=False)  # only its holder may release
    assert await ledger.release("a", "1-0", has_failed=False)
    assert not await ledger.release("a", "1-0", has_failed=False)
    assert await ledger.renew("a", ["1-0"]) == []  # a heartbeat on its way does not take it back
    assert ids(await ledger.claim("b", 0, 1)) == [0]
    assert not await ledger.release("a", "1-0", has_failed=False)


async def test_what_its_holder_chose_to_give_back_does_not_count_as_a_delivery(ledger: Ledger) -> None:
    await issue(ledger, 1)
    for _ in range(2 * MAX_DELIVERIES):
        assert [claim.deliveries for claim in await ledger.claim("a", 0, 1)] == [1]
        await ledger.release("a", "1-0", has_failed=False)
    assert (await ledger.depth()).dead == 0


async def test_old_weights_get_no_task_that_is_too_new_for_them(ledger: Ledger) -> None:
    await issue(ledger, 1, batch=0, min_version=0)
    await issue(ledger, 1, batch=3, min_version=3)
    assert await ledger.claim("old", 2, 8) == []
    assert ids(await ledger.claim("new", 3, 8)) == [0, 1]


async def test_a_task_claimed_too_often_is_a_dead_letter_and_its_batch_lacks_it(ledger: Ledger) -> None:
    await issue(ledger, 2, batch=1)
    for _ in range(MAX_DELIVERIES):
        claimed = await ledger.claim("a", 0, 1)
        assert ids(claimed) == [0]
        await ledger.release("a", claimed[0].entry_id, has_failed=True)
    assert ids(await ledger.claim("a", 0, 2)) == [1]
    assert await ledger.dead_letters(10) == [(task(0, batch=1), "deliveries")]
    assert (await ledger.live(), await ledger.depth()) == ({1: 1}, Depth(0, 1, 0, 0, 1))


async def test_a_buried_task_is_a_dead_letter_once(ledger: Ledger) -> None:
    await issue(ledger, 2)
    (claim,) = await ledger.claim("a", 0, 1)
    assert await ledger.bury(claim.entry_id, claim.task, "prompt too long")
    assert not await ledger.bury(claim.entry_id, claim.task, "prompt too long")
    assert not await ledger.complete(claim.entry_id, trajectory(claim.task))
    assert await ledger.dead_letters(10) == [(task(0), "prompt too long")]
    assert await ledger.live() == {0: 1}


async def test_a_task_of_another_code_version_is_an_error_that_says_so(ledger: Ledger, redis: Redis) -> None:
    await redis.xadd("ma:{test}:tasks", {"batch": 0, "task": b"\x81\xa6schema\x09"})
    with pytest.raises(WireError, match="schema 9"):
        await ledger.claim("a", 0, 1)


# Progress


async def test_a_claim_after_a_death_or_a_release_carries_the_last_saved_progress(ledger: Ledger) -> None:
    await issue(ledger, 1)
    assert [claim.progress for claim in await ledger.claim("a", 0, 1)] == [None]
    assert await ledger.save("a", "1-0", progress(0))
    assert await ledger.save("a", "1-0", progress(0, attempts=2))
    await asyncio.sleep(EXPIRY_S)
    (inherited,) = await ledger.claim("b", 0, 1)
    assert same(inherited.progress, progress(0, attempts=2))
    await ledger.release("b", "1-0", has_failed=False)
    (again,) = await ledger.claim("c", 0, 1)
    assert same(again.progress, progress(0, attempts=2))


async def test_only_the_holder_of_the_lease_saves_progress(ledger: Ledger) -> None:
    await issue(ledger, 1)
    await ledger.claim("a", 0, 1)
    assert not await ledger.save("b", "1-0", progress(0))
    await asyncio.sleep(EXPIRY_S)
    await ledger.claim("b", 0, 1)
    assert not await ledger.save("a", "1-0", progress(0))
    assert await ledger.save("b", "1-0", progress(0))
    await ledger.release("b", "1-0", has_failed=False)
    assert not await ledger.save("b", "1-0", progress(0, attempts=2))


async def test_saving_progress_renews_the_lease(ledger: Ledger) -> None:
    await issue(ledger, 1)
    await ledger.claim("a", 0, 1)
    for _ in range(4):
        await asyncio.sleep(EXPIRY_S / 2)
        assert await ledger.save("a", "1-0", progress(0))
        assert await ledger.claim("b", 0, 1) == []


async def test_progress_goes_with_its_task(ledger: Ledger, redis: Redis) -> None:
    await issue(ledger, 3)
    for claim in await ledger.claim("a", 0, 3):
        await ledger.save("a", claim.entry_id, progress(claim.task.task_id))
    assert await redis.hlen("ma:{test}:progress") == 3
    await ledger.complete("1-0", trajectory(task(0)))
    await ledger.bury("2-0", task(1), "prompt too long")
    for _ in range(MAX_DELIVERIES):
        await ledger.release("a", "3-0", has_failed=True)
        await ledger.claim("a", 0, 1)
    assert (await ledger.depth()).dead == 2
    assert await redis.hkeys("ma:{test}:progress") == []
    assert not await ledger.save("a", "1-0", progress(0))  # on its way when the task was completed


async def test_deliveries_that_led_to_an_attempt_are_no_failures(ledger: Ledger) -> None:
    await issue(ledger, 1)
    for attempts in range(1, 2 * MAX_DELIVERIES):
        assert ids(await ledger.claim("a", 0, 1)) == [0]
        await ledger.save("a", "1-0", progress(0, attempts=attempts))
        await ledger.release("a", "1-0", has_failed=True)
    for _ in range(MAX_DELIVERIES):
        assert (await ledger.depth()).dead == 0
        await ledger.claim("a", 0, 1)
        await ledger.release("a", "1-0", has_failed=True)
    assert (await ledger.depth()).dead == 1


# Completing


async def test_a_late_duplicate_completion_is_ignored(ledger: Ledger) -> None:
    await issue(ledger, 1)
    (first,) = await ledger.claim("slow", 0, 1)
    await asyncio.sleep(EXPIRY_S)
    (second,) = await ledger.claim("quick", 0, 1)
    assert await ledger.complete(second.entry_id, trajectory(second.task, replica_id="quick"))
    assert not await ledger.complete(first.entry_id, trajectory(first.task, replica_id="slow"))
    taken = await ledger.take("learner", 8, 0)
    assert [entry.trajectory.replica_id for entry in taken] == ["quick"]
    assert await ledger.live() == {0: 1}


async def test_a_result_after_the_lease_ran_out_still_counts_if_it_is_the_first(ledger: Ledger) -> None:
    await issue(ledger, 1)
    (first,) = await ledger.claim("slow", 0, 1)
    await asyncio.sleep(EXPIRY_S)
    await ledger.claim("quick", 0, 1)
    assert await ledger.complete(first.entry_id, trajectory(first.task))
    assert await ledger.renew("quick", [first.entry_id]) == []  # quick learns that it may stop


async def test_a_result_for_a_number_that_redis_lost_and_that_was_issued_again_does_not_count(
    ledger: Ledger, redis: Redis
) -> None:
    await issue(ledger, 1, batch=5)
    (old,) = await ledger.claim("a", 0, 1)
    await redis.flushall()
    await ledger.reconcile(0, 3, forget=[], gone={})
    await issue(ledger, 1, batch=3)
    assert not await ledger.complete(old.entry_id, trajectory(old.task))
    assert ids(await ledger.claim("b", 0, 1)) == [0]


# Taking


async def test_trajectories_are_taken_once_in_the_order_of_completion(ledger: Ledger) -> None:
    await issue(ledger, 3)
    claims = await ledger.claim("a", 0, 3)
    for claim in reversed(claims):
        await ledger.complete(claim.entry_id, trajectory(claim.task))
    taken = await ledger.take("learner", 2, 0) + await ledger.take("learner", 2, 0)
    assert [entry.trajectory.task_id for entry in taken] == [2, 1, 0]
    assert await ledger.take("learner", 2, 0) == []


async def test_a_trajectory_arrives_as_it_was_sent(ledger: Ledger) -> None:
    await issue(ledger, 1)
    await finish(ledger, 1)
    (taken,) = await ledger.take("learner", 1, 0)
    sent = trajectory(task(0))
    np.testing.assert_array_equal(taken.trajectory.token_ids, sent.token_ids)
    np.testing.assert_array_equal(taken.trajectory.logprobs, sent.logprobs)
    assert (taken.trajectory.versions, taken.trajectory.attempts) == (sent.versions, sent.attempts)


async def test_take_waits_for_the_first_trajectory_and_no_longer(ledger: Ledger) -> None:
    await issue(ledger, 1)
    waiting = asyncio.create_task(ledger.take("learner", 5, 5.0))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    await finish(ledger, 1)
    assert len(await asyncio.wait_for(waiting, 1.0)) == 1


async def test_take_replays_what_is_pending_after_a_restart_of_the_learner(ledger: Ledger, redis: Redis) -> None:
    await issue(ledger, 4)
    await finish(ledger, 3)
    before = [entry.entry_id for entry in await ledger.take("learner", 2, 0)]
    restarted = make_ledger(redis)
    await restarted.open()
    await finish(ledger, 1)
    after = [entry.entry_id for entry in await restarted.take("learner", 8, 0)]
    assert (after[:2], len(after)) == (before, 4)


async def test_take_replays_nothing_that_was_acknowledged(ledger: Ledger, redis: Redis) -> None:
    await issue(ledger, 3, batch=0)
    await finish(ledger, 3)
    taken = await ledger.take("learner", 3, 0)
    assert await ledger.acknowledge([entry.entry_id for entry in taken[:2]], through_batch=0) == 2
    await ledger.acknowledge([entry.entry_id for entry in taken[:2]], through_batch=0)
    restarted = make_ledger(redis)
    await restarted.open()
    assert [entry.entry_id for entry in await restarted.take("learner", 3, 0)] == [taken[2].entry_id]


async def test_trajectories_of_a_lost_reply_come_with_the_next_take(ledger: Ledger, redis: Redis) -> None:
    await issue(ledger, 3)
    await finish(ledger, 2)
    # The server hands the first out, and the connection breaks before the reply arrives.
    await redis.xreadgroup("learner", "learner", {"ma:{test}:trajectories": ">"}, count=1)
    await finish(ledger, 1)
    assert [entry.trajectory.task_id for entry in await ledger.take("learner", 8, 0)] == [0, 1, 2]


async def test_acknowledging_forgets_batches_up_to_the_checkpoint(ledger: Ledger) -> None:
    for batch in range(3):
        await issue(ledger, 1, batch=batch)
    await finish(ledger, 3)
    taken = await ledger.take("learner", 3, 0)
    await ledger.acknowledge([entry.entry_id for entry in taken[:2]], through_batch=1)
    assert await ledger.live() == {2: 1}


async def test_dropping_makes_room_for_a_replacement(ledger: Ledger) -> None:
    await issue(ledger, 2, batch=1)
    await finish(ledger, 2)
    taken = await ledger.take("learner", 2, 0)
    assert await ledger.drop([taken[0].entry_id], STALE) == 1
    assert await ledger.drop([taken[0].entry_id], STALE) == 0
    assert (await ledger.live(), await ledger.depth()) == ({1: 1}, Depth(0, 0, 0, 1, 0))


async def test_what_is_left_of_a_forgotten_batch_does_not_bring_its_count_back(ledger: Ledger) -> None:
    await issue(ledger, 2, batch=0)
    await finish(ledger, 1)
    (claim,) = await ledger.claim("a", 0, 1)
    (taken,) = await ledger.take("learner", 1, 0)
    await ledger.acknowledge([], through_batch=0)
    await ledger.bury(claim.entry_id, claim.task, "prompt too long")
    await ledger.drop([taken.entry_id], STALE)
    assert await ledger.live() == {}


async def test_depth_counts_every_place(ledger: Ledger) -> None:
    await issue(ledger, 10)
    await finish(ledger, 3)
    await ledger.take("learner", 1, 0)
    claims = await ledger.claim("a", 0, 3)
    await ledger.bury(claims[0].entry_id, claims[0].task, "unparsable gold")
    assert await ledger.depth() == Depth(4, 2, 2, 1, 1)


# Servers that die


async def test_a_killed_server_comes_back_with_its_data_and_the_callers_notice_only_a_wait(
    mortal_valkey: EmbeddedValkey,
) -> None:
    redis = await connect(mortal_valkey.url)
    ledger = make_ledger(redis)
    await ledger.open()
    await issue(ledger, 6)
    await finish(ledger, 2)
    taken = await ledger.take("learner", 1, 0)
    await asyncio.sleep(1.5)  # appendfsync everysec
    mortal_valkey.kill()
    calls = asyncio.gather(ledger.take("learner", 8, 0), ledger.claim("b", 0, 4), issue(ledger, 1, batch=1))
    await asyncio.sleep(0.3)
    assert not calls.done()
    await asyncio.to_thread(mortal_valkey.start)
    more, claims, counter = await calls
    assert [entry.trajectory.task_id for entry in taken + more] == [0, 1]
    assert (ids(claims)[:4], counter) == ([2, 3, 4, 5], 7)
    await redis.aclose()


async def test_a_server_that_lost_everything_is_filled_again_from_the_learners_counter(
    ledger: Ledger, redis: Redis
) -> None:
    await issue(ledger, 5)
    await redis.flushall()
    assert await ledger.claim("a", 0, 1) == []
    assert await ledger.take("learner", 1, 0) == []
    assert await ledger.may_lack_writes()
    await ledger.reconcile(5, 0, forget=[], gone={})
    assert not await ledger.may_lack_writes()
    assert await issue(ledger, 2) == 7
    assert ids(await ledger.claim("a", 0, 8)) == [5, 6]


async def test_trajectories_that_a_server_offers_again_are_handed_out_once(ledger: Ledger, redis: Redis) -> None:
    await issue(ledger, 3)
    await finish(ledger, 2)
    assert len(await ledger.take("learner", 8, 0)) == 2
    # The crash lost the group's last second: what was delivered counts as new again.
    await redis.xgroup_destroy("ma:{test}:trajectories", "learner")
    await redis.xgroup_create("ma:{test}:trajectories", "learner", id="0")
    await finish(ledger, 1)
    assert [entry.trajectory.task_id for entry in await ledger.take("learner", 8, 0)] == [2]
