"""Real vLLM: two replicas share one stream, and one is killed with all its places taken; an engine that dies."""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from audit import Audit
from boxy_model import save_model
from processes import Service, free_port
from redis.asyncio import Redis

from services.contracts.config import RunConfig, load, to_toml_dict
from services.contracts.ledger import Ledger
from services.contracts.registry import Registry
from services.contracts.valkey import EmbeddedValkey
from services.contracts.wire import Task, Trajectory

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]
NUM_TASKS = 120
ATTEMPTS = 8
RUN_S = 80.0


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, session_valkey: EmbeddedValkey) -> RunConfig:
    folder = tmp_path_factory.mktemp("kills")
    save_model(folder / "model")
    flags = {
        "run.dir": str(folder), "run.name": "kills", "redis.url": session_valkey.url, "redis.lease_s": "3",
        "model.dtype": "float32", "model.max_model_len": "512", "dialogue.system_prompt": "You have {attempts}",
        "dialogue.tokens_per_attempt": "40", "rollout.device": "cpu", "rollout.max_in_flight": "16",
        "rollout.max_num_seqs": "16", "rollout.kv_cache_mb": "64", "rollout.drain_grace_s": "0.2",
        "rollout.threads": "1", "grader.url": f"http://127.0.0.1:{free_port()}",
    }  # fmt: skip
    config = load(None, [f"--{key}={value}" for key, value in flags.items()], env={})
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.json").write_text(json.dumps(to_toml_dict(config)))
    (config.run_dir / "model.json").write_text(json.dumps({"path": str(folder / "model")}))
    return config


@pytest.fixture(scope="module")
def services(config: RunConfig) -> Iterator[list[Service]]:
    """The grader and two replicas; a test may add more."""
    running = [
        Service("grader", config, int(config.grader.url.rpartition(":")[2])),
        start_replica(config, "rollout-0"),
        start_replica(config, "rollout-1"),
    ]
    try:
        for service in running:
            service.wait_ready()
        yield running
    finally:
        for service in running:
            service.kill()


def start_replica(config: RunConfig, name: str) -> Service:
    return Service("rollout", config, free_port(), "--replica-id", name)


@pytest.fixture
async def ledger(config: RunConfig, redis: Redis, services: list[Service]) -> Ledger:
    ledger = Ledger(redis, run=config.run.name, lease_s=config.redis.lease_s, max_deliveries=5)
    await ledger.open()
    return ledger


async def issue(ledger: Ledger, count: int) -> None:
    first = await ledger.next_task()
    await ledger.issue(
        first,
        [
            Task(task_id=i, batch=0, problem=f"{i}+1", gold=("123456",), max_attempts=ATTEMPTS, seed=1000 * i)
            for i in range(first, first + count)
        ],
    )


async def collect(ledger: Ledger, found: list[Trajectory], count: int) -> None:
    deadline = time.monotonic() + RUN_S
    while len(found) < count:
        found += [taken.trajectory for taken in await ledger.take("test", count, 1.0)]
        assert time.monotonic() < deadline, f"{len(found)} of {count} trajectories, {await ledger.depth()}"


async def until_in_flight(redis: Redis, name: str, count: int, *, saved: int) -> None:
    """Until the replica holds so many tasks, of which so many have finished an attempt."""
    async with asyncio.timeout(RUN_S):
        while True:
            pending = await redis.xpending_range("ma:{kills}:tasks", "rollout", "-", "+", 999, consumername=name)
            entries = [one["message_id"] for one in pending]
            found = await redis.hmget("ma:{kills}:progress", entries) if entries else []
            if len(entries) >= count and sum(data is not None for data in found) >= saved:
                return
            await asyncio.sleep(0.01)


async def test_a_replica_killed_with_all_places_taken_loses_nothing_and_its_dialogues_go_on(
    ledger: Ledger, redis: Redis, config: RunConfig, services: list[Service]
) -> None:
    await issue(ledger, NUM_TASKS)
    await until_in_flight(redis, "rollout-0", 16, saved=8)
    services[1].kill()
    audit, found = Audit(), list[Trajectory]()
    killed = await audit.note_death(redis, config.run.name, "rollout-0")
    await collect(ledger, found, NUM_TASKS)
    report = audit.report(NUM_TASKS, found, await ledger.depth())
    sys.stdout.write(f"ledger audit: {json.dumps(report)}\n")
    assert (report["trajectories"], report["twice"], report["lost"], report["dead_letters"]) == (NUM_TASKS, 0, 0, 0)
    assert len(killed.in_flight) >= 16
    assert report["resumed"] == len(killed.saved) >= 8
    assert {found[i].replica_id for i in range(len(found))} <= {"rollout-0", "rollout-1"}
    assert all(t.replica_id == "rollout-1" for t in found if t.task_id in killed.saved)


async def test_a_replica_started_again_under_the_same_id_takes_part_again(
    ledger: Ledger, redis: Redis, config: RunConfig, services: list[Service]
) -> None:
    services[1] = start_replica(config, "rollout-0")
    services[1].wait_ready()
    assert [r.replica_id for r in await Registry(redis, run="kills").replicas()] == ["rollout-0", "rollout-1"]
    await issue(ledger, 60)
    found: list[Trajectory] = []
    await collect(ledger, found, 60)
    assert {trajectory.replica_id for trajectory in found} == {"rollout-0", "rollout-1"}


async def test_a_drain_past_its_grace_period_gives_the_dialogues_to_another(
    ledger: Ledger, redis: Redis, config: RunConfig, services: list[Service]
) -> None:
    await issue(ledger, NUM_TASKS)
    await until_in_flight(redis, "rollout-0", 16, saved=8)
    services[1].process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(services[1].process.wait, 60) == 0
    assert [r.replica_id for r in await Registry(redis, run="kills").replicas()] == ["rollout-1"]
    found: list[Trajectory] = []
    await collect(ledger, found, NUM_TASKS)
    assert sorted(trajectory.task_id for trajectory in found) == list(range(NUM_TASKS))
    assert (await ledger.depth())[:2] == (0, 0)


async def test_an_engine_that_dies_ends_its_replica_with_one_clear_line(
    ledger: Ledger, redis: Redis, config: RunConfig, services: list[Service]
) -> None:
    await issue(ledger, 40)
    await until_in_flight(redis, "rollout-1", 16, saved=4)
    replica = services[2]
    engines = [p for p in psutil.Process(replica.process.pid).children(recursive=True) if "tracker" not in cmdline(p)]
    os.kill(engines[0].pid, signal.SIGKILL)
    assert await asyncio.to_thread(replica.process.wait, 30) == 1
    last = Path(config.run_dir / f"rollout-{replica.url.rpartition(':')[2]}.log").read_text().splitlines()[-1]
    assert last == "multiattempt: error: the replica failed: EngineDead: the engine's process has died"
    claims = await ledger.claim("another", 0, 40)  # no lease to wait for
    assert (await ledger.depth()).waiting == 0
    assert any(claim.progress is not None for claim in claims)


def cmdline(process: psutil.Process) -> str:
    return " ".join(process.cmdline())
