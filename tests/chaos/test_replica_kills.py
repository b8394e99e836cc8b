"""Replicas that share one stream are killed, drained and started again: every dialogue comes once, and goes on."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from audit import Audit
from redis.asyncio import Redis

from services.contracts.ledger import Ledger
from services.contracts.registry import Registry
from services.contracts.wire import Task, Trajectory

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]
RUN = "chaos"
LEASE_S = 1.0
NUM_TASKS = 240
ATTEMPTS = 5
DEADLINE_S = 80.0


class Replicas:
    """Processes by name; each start of one has a version of its own."""

    def __init__(self, url: str, folder: Path) -> None:
        self._url, self._folder = url, folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.num_started = 0

    def start(self, name: str) -> None:
        command = [sys.executable, "tests/chaos/fake_replica.py", self._url, RUN, name, str(self.num_started)]
        with (self._folder / f"{name}.{self.num_started}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        self.num_started += 1

    def check(self) -> None:
        """All are alive, or the test fails with what one of them said last."""
        for name, process in self.processes.items():
            logs = sorted(self._folder.glob(f"{name}.*.log"), key=lambda path: path.stat().st_mtime)
            assert process.poll() is None, logs[-1].read_text()[-2000:]

    async def end(self, name: str, number: signal.Signals) -> int:
        process = self.processes.pop(name)
        process.send_signal(number)
        return await asyncio.to_thread(process.wait, 20)


@pytest.fixture
def replicas(redis_url: str, tmp_path: Path) -> Iterator[Replicas]:
    started = Replicas(redis_url, tmp_path)
    yield started
    for process in started.processes.values():
        process.kill()
        process.wait(10)


@pytest.fixture
async def ledger(redis: Redis) -> Ledger:
    ledger = Ledger(redis, run=RUN, lease_s=LEASE_S, max_deliveries=5)
    await ledger.open()
    tasks = [
        Task(task_id=i, batch=0, problem=f"{i}+1", gold=("none",), max_attempts=ATTEMPTS, seed=1000 * i)
        for i in range(NUM_TASKS)
    ]
    await ledger.issue(0, tasks)
    return ledger


async def until_running(ledger: Ledger, count: int) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while (await ledger.depth()).running < count:
            await asyncio.sleep(0.02)


async def collect(ledger: Ledger, replicas: Replicas, found: list[Trajectory], count: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while len(found) < count:
        replicas.check()
        found += [taken.trajectory for taken in await ledger.take("test", count, 0.2)]
        assert time.monotonic() < deadline, (len(found), await ledger.depth())


async def attempts_begun(redis: Redis) -> dict[int, int]:
    """How often each attempt has begun, by its seed."""
    return {int(seed): int(count) for seed, count in (await redis.hgetall("begun")).items()}


async def test_many_kills_lose_nothing_double_nothing_and_repeat_no_finished_attempt(
    ledger: Ledger, redis: Redis, replicas: Replicas
) -> None:
    chance, audit, found = random.Random(4), Audit(), list[Trajectory]()
    for name in ("rollout-0", "rollout-1"):
        replicas.start(name)
    finished: dict[int, int] = {}  # seed of an attempt that was saved when its replica died -> how often it had begun
    for _ in range(6):
        await until_running(ledger, 32)  # both full
        await asyncio.sleep(chance.uniform(0.2, 0.8))
        name = chance.choice(("rollout-0", "rollout-1"))
        await replicas.end(name, signal.SIGKILL)
        killed = await audit.note_death(redis, RUN, name)
        begun = await attempts_begun(redis)
        seeds = [1000 * task_id + k for task_id, one in killed.saved.items() for k in range(len(one.attempts))]
        finished |= {seed: begun[seed] for seed in seeds}
        replicas.start(name)  # under the same id, while its old tasks are still leased to it
        found += [taken.trajectory for taken in await ledger.take("test", NUM_TASKS, 0.0)]
    await collect(ledger, replicas, found, NUM_TASKS)
    begun = await attempts_begun(redis)
    report = audit.report(NUM_TASKS, found, await ledger.depth())
    report["attempts_begun_again"] = sum(count - 1 for count in begun.values())
    sys.stdout.write(f"ledger audit: {json.dumps(report)}\n")

    assert (report["trajectories"], report["twice"], report["lost"], report["dead_letters"]) == (NUM_TASKS, 0, 0, 0)
    assert report["left_in_ledger"] == 0
    assert max(len(kill.in_flight) for kill in audit.kills) >= 16  # full; more: what its last life held, too
    assert report["in_flight_at_kills"] > 6 * 12
    assert report["with_saved_attempts"] >= 16
    assert report["attempts_begun_again"] <= report["in_flight_at_kills"]  # only those under way at a death
    assert finished and {seed: begun[seed] for seed in finished} == finished  # none of them was begun again
    assert any(len({span.version for span in trajectory.versions}) > 1 for trajectory in found)
    assert all(len(trajectory.attempts) == ATTEMPTS for trajectory in found)
    assert await redis.hlen(f"ma:{{{RUN}}}:progress") == 0


async def test_what_a_draining_replica_gives_back_goes_on_at_once_and_counts_for_nothing(
    ledger: Ledger, redis: Redis, replicas: Replicas
) -> None:
    replicas.start("rollout-0")
    await until_running(ledger, 16)
    await asyncio.sleep(0.5)
    started = time.monotonic()
    assert await replicas.end("rollout-0", signal.SIGTERM) == 0
    assert time.monotonic() - started < 3.0  # a grace period of 0.3 s, not the 2 s that dialogues take
    assert await Registry(redis, run=RUN).replicas() == []
    given_back = (await ledger.depth()).running
    assert given_back > 0
    claims = await ledger.claim("another", 0, NUM_TASKS)  # no lease to wait for
    again = [claim for claim in claims if claim.progress is not None]
    assert again and len(claims) == NUM_TASKS - len(await ledger.take("test", NUM_TASKS, 0.0))
    assert {claim.deliveries for claim in claims} == {1}


async def test_a_second_sigterm_ends_a_draining_replica_at_once(ledger: Ledger, replicas: Replicas) -> None:
    replicas.start("rollout-0")
    await until_running(ledger, 16)
    os.kill(replicas.processes["rollout-0"].pid, signal.SIGTERM)
    await asyncio.sleep(0.05)
    assert await replicas.end("rollout-0", signal.SIGTERM) == 128 + signal.SIGTERM
