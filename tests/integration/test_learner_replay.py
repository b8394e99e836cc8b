"""A learner that is killed and resumed trains on the same tasks, to the same losses and weights, as one that is not."""

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from learner_data import make_trajectory
from redis.asyncio import Redis
from test_learner_process import make_run, start

from services.contracts.config import RunConfig
from services.contracts.ledger import Ledger
from services.contracts.registry import Registry

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
LAST = 6  # updates; the newest checkpoint before it is that of update 4
BATCH = 8
FIGURES = ("policy_loss", "value_loss", "grad_norm", "critic_grad_norm", "kl_behaviour", "reward", "entropy", "lr")
WAIT_S = 200.0


@contextlib.asynccontextmanager
async def rollout(redis: Redis) -> AsyncIterator[None]:
    """Stands in for the replicas: the dialogue of a task follows from its number, so two queues hold the same."""

    async def answer() -> None:
        ledger, registry = Ledger(redis, run="process", lease_s=5, max_deliveries=3), Registry(redis, run="process")
        await ledger.open()
        while True:
            for claim in await ledger.claim("rollout-0", await registry.version(), BATCH):
                task = claim.task
                await ledger.complete(
                    claim.entry_id, make_trajectory(task.task_id, batch=task.batch, version=task.batch)
                )
            await asyncio.sleep(0.01)

    answering = asyncio.create_task(answer())
    try:
        yield
    finally:
        answering.cancel()
        await asyncio.gather(answering, return_exceptions=True)


def figures(config: RunConfig) -> list[dict[str, float]]:
    path = config.run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def trained(config: RunConfig) -> dict[str, str]:
    """Step -> task ids, in the newest checkpoint's books."""
    manifest = json.loads((config.run_dir / "checkpoints" / f"v{LAST:08d}" / "manifest.json").read_text())
    steps: dict[str, str] = manifest["books"]["trained"]
    return steps


def weights(config: RunConfig) -> str:
    files = sorted((config.run_dir / "checkpoints" / f"v{LAST:08d}" / "hf").glob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


async def until(condition: Callable[[], object], learner: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert learner.poll() is None and time.monotonic() < deadline, learner.communicate()
        await asyncio.sleep(0.002)


async def finish(learner: "subprocess.Popen[str]") -> tuple[int, str]:
    """Exit code and standard error."""
    try:
        _, err = await asyncio.to_thread(learner.communicate, timeout=WAIT_S)
    finally:
        learner.kill()
    return learner.returncode, err


async def test_a_killed_learner_repeats_the_same_updates_to_the_bit(
    tmp_path: Path, redis: Redis, redis_url: str
) -> None:
    config = make_run(tmp_path, redis_url, f"--run.steps={LAST}", "--learner.threads=1")
    async with rollout(redis):
        assert (await finish(start(config)))[0] == 0
    undisturbed = figures(config), trained(config), weights(config)
    for path in (config.run_dir / "checkpoints", config.run_dir / "metrics.jsonl"):
        path.rename(path.with_name(f"undisturbed-{path.name}"))
    await redis.flushall()

    async with rollout(redis):
        learner, newest = start(config), config.run_dir / "checkpoints" / "v00000004"
        await until(lambda: len(figures(config)) >= LAST - 1 and newest.exists(), learner)  # 5 is in no checkpoint
        os.kill(learner.pid, signal.SIGKILL)
        await finish(learner)
        assert [path.name for path in (config.run_dir / "checkpoints").glob("v*")] == ["v00000004"]
        code, err = await finish(start(config, "--resume"))
        assert code == 0, err

    assert trained(config) == undisturbed[1] == {str(k + 1): f"{k * BATCH}-{k * BATCH + 7}" for k in range(LAST)}
    assert [row["step"] for row in figures(config)] == list(range(1, LAST + 1))
    for again, before in zip(figures(config), undisturbed[0], strict=True):
        assert {name: again[name] for name in FIGURES if name in before} == {
            name: before[name] for name in FIGURES if name in before
        }
    assert weights(config) == undisturbed[2]
