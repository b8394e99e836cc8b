"""The learner's loop on a real ledger: batches fill, stale and lost work is replaced, nothing is trained twice."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable

import msgspec
import pytest
from learner_data import make_trajectory
from loop_fakes import MemoryPublisher, MemoryTrainer, make_config, make_ledger, make_loop, rollout
from redis.asyncio import Redis

from services.learner import loop as loop_module
from services.learner.loop import StarvedError
from services.learner.stopwatch import STEP_PARTS

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("staleness", [0, 1, 3])
async def test_every_batch_is_full_fresh_enough_and_trained_once(redis: Redis, staleness: int) -> None:
    trainer, publisher = MemoryTrainer(), MemoryPublisher()
    loop = make_loop(redis, make_config(max_staleness=str(staleness)), trainer, publisher)
    async with rollout(redis, publisher):
        await loop.run()
    assert [len(batch) for batch in trainer.batches] == [8] * 5
    ids = [t.task_id for batch in trainer.batches for t in batch]
    assert len(set(ids)) == 40
    for version, batch in enumerate(trainer.batches):
        assert all(t.batch == version and 0 <= version - t.oldest_version <= staleness for t in batch)
    assert publisher.history == [0, 1, 2, 3, 4, 5]
    assert [version for version, _ in trainer.saved] == [2, 4, 5]
    depth = await make_ledger(redis).depth()
    assert (depth.waiting, depth.running, depth.trajectories_ready, depth.trajectories_taken) == (0, 0, 0, 0)


async def test_a_trajectory_that_is_too_old_is_dropped_counted_and_replaced(redis: Redis) -> None:
    trainer, publisher = MemoryTrainer(), MemoryPublisher()
    loop = make_loop(redis, make_config(max_staleness="0"), trainer, publisher)
    async with rollout(redis, publisher, lag={9: 1, 12: 1}):
        await loop.run()
    trained = {t.task_id for batch in trainer.batches for t in batch}
    assert trained == set(range(42)) - {9, 12}
    assert loop._metrics.lines[1][1]["dropped_stale"] == 2.0  # type: ignore[attr-defined]


async def test_groups_stay_in_one_batch_and_whole_but_for_one_that_lost_a_member(redis: Redis) -> None:
    trainer, publisher = MemoryTrainer(), MemoryPublisher()
    loop = make_loop(redis, make_config(samples_per_problem="4"), trainer, publisher)
    async with rollout(redis, publisher, poisoned={9}):
        await loop.run()
    assert [len(batch) for batch in trainer.batches] == [8] * 5
    groups = [Counter(t.task_id // 4 for t in batch) for batch in trainer.batches]
    assert sum(len(set(group)) for group in groups) == len(set().union(*groups))  # none is in two batches
    assert [sorted(group.values()) for i, group in enumerate(groups) if i != 1] == [[4, 4]] * 4
    assert groups[1][3] == 4 and max(groups[1][2], groups[1][4]) >= 3


async def test_a_learner_that_died_replays_the_batches_since_its_checkpoint(redis: Redis) -> None:
    config, publisher = make_config(max_staleness="1"), MemoryPublisher()
    first = MemoryTrainer()
    loop = make_loop(redis, config, first, publisher)
    async with rollout(redis, publisher):
        running = asyncio.create_task(loop.run())
        while first.version < 3:
            await asyncio.sleep(0.01)
        running.cancel()  # between two awaits, as a kill would
        with contextlib.suppress(asyncio.CancelledError):
            await running
        done = len(first.batches)
        version, next_task = first.saved[-1]
        second = MemoryTrainer(version=version, next_task=next_task)
        await make_loop(redis, config, second, publisher).run()
    again = done - version
    replayed = [[t.task_id for t in batch] for batch in second.batches[:again]]
    assert replayed == [[t.task_id for t in batch] for batch in first.batches[version:]]
    assert version + len(second.batches) == 5


async def test_a_lost_redis_volume_goes_on_from_the_checkpoints_counter(redis: Redis) -> None:
    trainer, publisher = MemoryTrainer(version=3, next_task=24), MemoryPublisher()
    async with rollout(redis, publisher):
        await make_loop(redis, make_config(), trainer, publisher).run()
    assert [t.task_id for batch in trainer.batches for t in batch] == list(range(24, 40))


async def test_a_dead_letter_is_replaced(redis: Redis) -> None:
    trainer, publisher = MemoryTrainer(), MemoryPublisher()
    loop = make_loop(redis, make_config(), trainer, publisher)
    ledger = make_ledger(redis)
    await ledger.open()
    running = asyncio.create_task(loop.run())
    while not (claims := await ledger.claim("rollout-0", publisher.version, 1)):
        await asyncio.sleep(0.01)
    await ledger.bury(claims[0].entry_id, claims[0].task, "prompt too long")
    async with rollout(redis, publisher):
        await running
    assert [len(batch) for batch in trainer.batches] == [8] * 5


async def test_asked_to_stop_it_saves_what_it_has_done(redis: Redis) -> None:
    trainer, publisher = MemoryTrainer(), MemoryPublisher()
    loop = make_loop(redis, make_config(checkpoint_every="100"), trainer, publisher)
    async with rollout(redis, publisher):
        running = asyncio.create_task(loop.run())
        while trainer.version < 2:
            await asyncio.sleep(0.01)
        loop.stop.set()
        await asyncio.wait_for(running, 5)
    assert [version for version, _ in trainer.saved] == [trainer.version]


async def test_a_full_disk_pauses_the_run_until_there_is_space(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "RETRY_SAVE_S", 0.3)
    trainer, publisher = MemoryTrainer(), MemoryPublisher()
    trainer.full_disk = 2
    loop = make_loop(redis, make_config(), trainer, publisher)
    async with rollout(redis, publisher):
        running = asyncio.create_task(loop.run())
        while loop.trouble is None or "paused" not in loop.trouble:
            await asyncio.sleep(0.01)
        assert trainer.version == 2
        await running
    assert [version for version, _ in trainer.saved] == [2, 4, 5] and loop.trouble is None


async def test_a_full_disk_pauses_the_run_at_its_metrics_too(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "RETRY_SAVE_S", 0.3)
    publisher = MemoryPublisher()
    loop = make_loop(redis, make_config(), MemoryTrainer(), publisher)
    loop._metrics.full_disk = 2
    async with rollout(redis, publisher):
        running = asyncio.create_task(loop.run())
        while loop.trouble is None or "paused" not in loop.trouble:
            await asyncio.sleep(0.01)
        assert "free some disk space" in loop.trouble
        await running
    assert [step for step, _ in loop._metrics.lines] == [1, 2, 3, 4, 5] and loop.trouble is None


async def test_a_batch_that_never_fills_is_an_error_that_says_how_far_it_came(redis: Redis) -> None:
    loop = make_loop(redis, make_config(take_timeout_s="0.5"), MemoryTrainer(), MemoryPublisher())
    with pytest.raises(StarvedError, match="batch 0: 0 of 8 dialogues"):
        await loop.run()


async def test_a_second_copy_of_a_trajectory_is_not_trained_twice(redis: Redis) -> None:
    trainer, publisher = MemoryTrainer(), MemoryPublisher()
    loop = make_loop(redis, make_config(), trainer, publisher)
    await loop._ledger.open()
    trajectory = make_trajectory(3)
    other = msgspec.structs.replace(trajectory, replica_id="rollout-1")
    for number, copy in enumerate((trajectory, other)):
        await loop._admit(loop_module.Taken(f"{number + 1}-0", copy), 0)
    assert [taken.entry_id for taken in loop._held[0].values()] == ["1-0"]


async def test_a_run_set_back_to_an_older_checkpoint_generates_the_lost_batches_anew(redis: Redis) -> None:
    config, publisher = make_config(max_staleness="1", take_timeout_s="10"), MemoryPublisher()
    async with rollout(redis, publisher):
        await make_loop(redis, config, MemoryTrainer(), publisher).run()
        trainer = MemoryTrainer(version=2, next_task=24)  # checkpoints 4 and 5 turned out to be damaged
        await make_loop(redis, config, trainer, publisher).run()
    assert [len(batch) for batch in trainer.batches] == [8] * 3
    assert all(t.task_id >= 40 for batch in trainer.batches for t in batch)


async def test_a_trajectory_that_would_poison_the_update_is_replaced(redis: Redis) -> None:
    trainer, publisher = MemoryTrainer(), MemoryPublisher()
    loop = make_loop(redis, make_config(), trainer, publisher)
    async with rollout(redis, publisher, poisoned={3}):
        await loop.run()
    assert {t.task_id for batch in trainer.batches for t in batch} == set(range(41)) - {3}


async def test_the_next_tasks_are_out_before_the_checkpoint_is_written(redis: Redis) -> None:
    trainer, publisher = MemoryTrainer(), MemoryPublisher()
    async with rollout(redis, publisher):
        await make_loop(redis, make_config(), trainer, publisher).run()
    assert trainer.saved == [(2, 24), (4, 40), (5, 40)]


def in_time(condition: Callable[[], object]) -> None:
    """Called in a thread: wait until it holds, or fail."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not happen while the update was under way"
        time.sleep(0.005)


@pytest.mark.parametrize("staleness", [0, 1])
async def test_while_the_critic_learns_weights_are_out_and_the_next_batch_comes_in_and_is_packed(
    redis: Redis, staleness: int
) -> None:
    trainer, publisher = MemoryTrainer(), MemoryPublisher()
    loop = make_loop(redis, make_config(max_staleness=str(staleness)), trainer, publisher)

    def critic() -> None:
        if trainer.version < 5:
            in_time(lambda: publisher.version == trainer.version)
            in_time(lambda: trainer.staged and trainer.staged[-1][0] == trainer.version)

    trainer.after_actor = critic
    async with rollout(redis, publisher):
        await loop.run()
    batches = [[trajectory.task_id for trajectory in batch] for batch in trainer.batches]
    assert trainer.staged == list(enumerate(batches))[1:]


async def test_what_has_come_of_a_batch_is_asked_about_once_before_it_is_trained(redis: Redis) -> None:
    trainer, publisher = MemoryTrainer(), MemoryPublisher()
    trainer.ask_tokens = 25
    loop = make_loop(redis, make_config(batch_dialogues="40", minibatch_dialogues="8"), trainer, publisher)
    async with rollout(redis, publisher):
        running = asyncio.create_task(loop.run())
        await running
    trained = [trajectory.task_id for batch in trainer.batches for trajectory in batch]
    asked = [task_id for part in trainer.asked for task_id in part]
    assert len(asked) == len(set(asked)) > 20 and set(asked) <= set(trained)


async def test_the_parts_of_a_step_sum_to_the_whole(redis: Redis) -> None:
    trainer, publisher = MemoryTrainer(), MemoryPublisher()
    loop = make_loop(redis, make_config(), trainer, publisher)
    started = time.perf_counter()
    async with rollout(redis, publisher):
        await loop.run()
    lines = [line for _, line in loop._metrics.lines]  # type: ignore[attr-defined]
    for line in lines:
        parts = [line[f"{part}_s"] for part in STEP_PARTS]
        assert sum(parts) == pytest.approx(line["step_s"], rel=1e-9) and min(parts) >= 0
    assert [line["checkpoint_s"] > 0 for line in lines] == [False, True, False, True, True]
    assert sum(line["step_s"] for line in lines) < time.perf_counter() - started


async def test_a_version_is_measured_while_the_replicas_have_it_and_a_failure_costs_only_the_figure(
    redis: Redis,
) -> None:
    trainer, publisher = MemoryTrainer(), MemoryPublisher()
    config = make_config()
    config = config.model_copy(
        update={
            "evaluation": config.evaluation.model_copy(update={"every": 2}),
            "learner": config.learner.model_copy(update={"checkpoint_best": "dev_accuracy"}),
        }
    )
    loop = make_loop(redis, config, trainer, publisher)
    seen: list[tuple[int, int, int]] = []

    async def evaluate(version: int) -> dict[str, float]:
        await asyncio.sleep(0.3)  # the replicas have their next tasks meanwhile
        seen.append((version, publisher.version, trainer.version))
        return {"dev_accuracy": version / 10} if version != 4 else {}

    loop.evaluate = evaluate
    async with rollout(redis, publisher):
        await loop.run()
    assert seen == [(2, 2, 2), (4, 4, 4), (5, 5, 5)]
    lines = loop._metrics.lines  # type: ignore[attr-defined]
    assert [figures.get("dev_accuracy") for _, figures in lines] == [None, 0.2, None, None, 0.5]
    assert [version for version, _ in trainer.saved] == [2, 4, 5]
    assert [len({t.task_id for t in batch}) for batch in trainer.batches] == [8] * 5


async def test_a_measurement_does_not_keep_the_run_from_stopping(redis: Redis) -> None:
    trainer, publisher = MemoryTrainer(), MemoryPublisher()
    config = make_config()
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"every": 1})})
    loop = make_loop(redis, config, trainer, publisher)

    async def evaluate(version: int) -> dict[str, float]:
        loop.stop.set()
        await asyncio.sleep(1000)
        return {}

    loop.evaluate = evaluate
    async with rollout(redis, publisher):
        await loop.run()
    assert [version for version, _ in trainer.saved] == [trainer.version] and trainer.version < 5
