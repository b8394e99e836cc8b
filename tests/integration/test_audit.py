"""`multiattempt audit`: a live run, one that has ended, broken books, and no Redis."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
from loop_fakes import MemoryPublisher, MemoryTrainer, make_config, make_loop, rollout
from redis.asyncio import Redis

from services.cli.__main__ import main
from services.cli.audit import run_audit
from services.contracts.books import format_ranges, parse_ranges
from services.contracts.config import RunConfig, load, to_toml_dict
from services.contracts.store import connect
from services.contracts.valkey import EmbeddedValkey
from services.learner.checkpoint import MANIFEST, Checkpoints

pytestmark = pytest.mark.integration
STEPS = 5


def write_config(run: Path, url: str) -> RunConfig:
    config = load(None, ["--run.name=loop", f"--run.dir={run.parent}", f"--redis.url={url}"], env={})
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(json.dumps(to_toml_dict(config)))
    return config


async def train(redis: Redis, run: Path, *, max_staleness: int = 1, until: int = STEPS) -> None:
    """A learner's loop with a replica, and checkpoints in the run's folder; ends at version `until` as a kill would."""
    trainer, publisher = MemoryTrainer(folder=run / "checkpoints"), MemoryPublisher()
    loop = make_loop(redis, make_config(max_staleness=str(max_staleness)), trainer, publisher)
    async with rollout(redis, publisher, lag={9: 2, 12: 2}):
        running = asyncio.create_task(loop.run())
        while trainer.version < until and not running.done():
            await asyncio.sleep(0.001)
        if until < STEPS:
            running.cancel()
        await asyncio.gather(running, return_exceptions=until < STEPS)


async def audit(run: Path, capsys: pytest.CaptureFixture[str]) -> dict:
    code = await run_audit(run, is_json=True)
    found = json.loads(capsys.readouterr().out)
    assert code == (0 if found["clean"] else 1)
    return found


async def test_a_finished_run_adds_up(redis: Redis, redis_url: str, tmp_path: Path, capsys) -> None:
    run = tmp_path / "loop"
    write_config(run, redis_url)
    await train(redis, run)
    found = await audit(run, capsys)
    assert found == {
        "run": str(run),
        "issued": 42,
        "checkpoint": STEPS,
        "queued": 0,
        "running": 0,
        "trajectory_waiting": 0,
        "trained": {str(step): 8 for step in range(1, STEPS + 1)},
        "dropped": {"stale": 2},
        "leftovers": 0,
        "unaccounted": [],
        "conflicts": {},
        "clean": True,
    }
    assert await run_audit(run, is_json=False) == 0
    table = capsys.readouterr().out
    assert "42 tasks issued" in table and table.endswith("every task is in exactly one state\n")


async def test_a_live_run_adds_up_at_every_moment(redis: Redis, redis_url: str, tmp_path: Path, capsys) -> None:
    run = tmp_path / "loop"
    write_config(run, redis_url)
    looks = []
    for until in (1, 2, 3, 4, STEPS):  # the learner is killed four times
        training = asyncio.create_task(train(redis, run, until=until))
        while not training.done():
            looks.append(await audit(run, capsys))
            await asyncio.sleep(0.005)
        await training
        looks.append(await audit(run, capsys))
    assert all(look["clean"] for look in looks), [look for look in looks if not look["clean"]]
    assert len({look["checkpoint"] for look in looks}) >= 3
    assert sum(look["trajectory_waiting"] for look in looks) > 0
    assert sum(looks[-1]["trained"].values()) == 8 * STEPS


async def lose_a_task(redis: Redis, run: Path) -> int:
    (entry, _), *_ = await redis.xrange("ma:{loop}:tasks")
    await redis.xdel("ma:{loop}:tasks", entry)
    return int(entry.split(b"-")[0]) - 1


async def lose_a_trajectory(redis: Redis, run: Path) -> int:
    (entry, fields), *_ = await redis.xrange("ma:{loop}:trajectories")
    await redis.xdel("ma:{loop}:trajectories", entry)
    return int(fields[b"task"])


async def copy_a_trajectory(redis: Redis, run: Path) -> int:
    *_, (_, fields) = await redis.xrange("ma:{loop}:trajectories")
    await redis.xadd("ma:{loop}:trajectories", fields)
    return int(fields[b"task"])


async def queue_a_trained_task(redis: Redis, run: Path) -> int:
    await redis.delete("ma:{loop}:tasks")
    await redis.xadd("ma:{loop}:tasks", {"batch": 4, "task": b""}, id="1-0")
    return 0


async def forget_a_drop(redis: Redis, run: Path) -> int:
    return _edit_books(run, "dropped", "stale", lambda ids: ids[1:])


async def forget_that_one_was_trained(redis: Redis, run: Path) -> int:
    return _edit_books(run, "trained", "1", lambda ids: ids[1:])


async def train_one_twice(redis: Redis, run: Path) -> int:
    return _edit_books(run, "trained", "2", lambda ids: [*ids, 0])


def _edit_books(run: Path, part: str, key: str, edit: Callable[[list[int]], list[int]]) -> int:
    """Change the ids of a fate in the newest manifest. Returns the id that came or went."""
    found = Checkpoints(run / "checkpoints", keep=1).latest()
    assert found is not None
    manifest = msgspec.json.decode((found[0] / MANIFEST).read_bytes())
    before = [i for one in parse_ranges(manifest["books"][part][key]) for i in one]
    after = edit(before)
    manifest["books"][part][key] = format_ranges(after)
    (found[0] / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    return (set(before) ^ set(after)).pop()


@pytest.mark.parametrize(
    "break_it",
    [
        lose_a_task,
        lose_a_trajectory,
        copy_a_trajectory,
        queue_a_trained_task,
        forget_a_drop,
        forget_that_one_was_trained,
        train_one_twice,
    ],
)
async def test_broken_books_are_found_and_the_task_is_named(
    redis: Redis,
    redis_url: str,
    tmp_path: Path,
    capsys,
    break_it: Callable[[Redis, Path], Awaitable[int]],
) -> None:
    run = tmp_path / "loop"
    write_config(run, redis_url)
    await train(redis, run, until=3)
    await fill_the_queue(redis, run)
    assert (await audit(run, capsys))["clean"]
    task_id = await break_it(redis, run)
    found = await audit(run, capsys)
    offenders = {*found["unaccounted"], *map(int, found["conflicts"])}
    assert task_id in offenders
    assert await run_audit(run, is_json=False) == 1
    assert f"task {task_id}:" in (table := capsys.readouterr().out) or "in no state: " in table


async def fill_the_queue(redis: Redis, run: Path) -> None:
    """Start the learner without replicas until it has issued, so that tasks are queued."""
    trainer = MemoryTrainer(folder=run / "checkpoints")
    loop = make_loop(redis, make_config(max_staleness="1"), trainer, MemoryPublisher())
    running = asyncio.create_task(loop.run())
    while not await redis.xlen("ma:{loop}:tasks"):
        await asyncio.sleep(0.005)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_run_that_ended_with_its_own_valkey_is_read_from_a_copy(tmp_path: Path, capsys) -> None:
    run = tmp_path / "loop"
    with EmbeddedValkey(run / "valkey") as server:
        write_config(run, server.url)
        client = await connect(server.url)
        await train(client, run)
        await client.aclose()
    before = {path: path.read_bytes() for path in sorted((run / "valkey").rglob("*")) if path.is_file()}
    found = await audit(run, capsys)
    assert found["clean"] and sum(found["trained"].values()) == 8 * STEPS
    assert before == {path: path.read_bytes() for path in sorted((run / "valkey").rglob("*")) if path.is_file()}


def test_without_redis_it_is_one_line_and_exit_code_2(tmp_path: Path, capsys) -> None:
    run = tmp_path / "loop"
    write_config(run, "redis://:secret@127.0.0.1:1/0")
    assert main(["audit", str(run)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("multiattempt: error: no Redis at redis://:***@127.0.0.1:1/0: ")
    assert error.count("\n") == 1 and "secret" not in error


def test_no_run_is_one_line_and_exit_code_2(tmp_path: Path, capsys) -> None:
    assert main(["audit", str(tmp_path)]) == 2
    assert "not a run" in capsys.readouterr().err
