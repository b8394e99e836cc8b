"""How many tasks the ledger moves on one core, whole lives counted: `python -m benchmarks.ledger`.

A real Valkey and one client process that plays learner and replicas, all on one core. Each task is issued, claimed (16
at a time), saved after each of its unfinished attempts, completed with a trajectory of TOKENS tokens, taken and
acknowledged: a round trip. Two references: REQUIRED round trips a second, which is twice what 1,000 dialogues a second
need, and SET and GET of the same bytes in pipelines by the bare client, measured in the same run: no ledger moves them
faster. Encoding and decoding are in ours and not in that. A snapshot of what an audit reads is timed too.
"""

import argparse
import asyncio
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from services.contracts.ledger import Claim, Ledger
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
    encode,
)

TOKENS = 2000
REPLICAS, CLAIM = 4, 16
REQUIRED = 2000  # round trips a second
PIPELINE = 16
TIMINGS = Timings(generate_s=1.0, grade_s=0.1, total_s=1.1)


def arrays(length: int) -> tuple[np.ndarray, np.ndarray, tuple[VersionSpan, ...], tuple[Attempt, ...]]:
    """Token ids, log-probabilities, spans and attempts of a prompt and one attempt, `length` tokens in all."""
    logprobs = np.full(length, -0.5, dtype=np.float32)
    logprobs[:100] = np.nan
    attempt = Attempt(start=100, end=length, extracted="3", verdict=Verdict.INCORRECT, grading_ms=1.0)
    return np.arange(length, dtype=np.int32), logprobs, (VersionSpan(0, 100, length),), (attempt,)


def make_progress(task: Task, length: int) -> Progress:
    token_ids, logprobs, spans, attempts = arrays(length)
    return Progress(
        task_id=task.task_id, token_ids=token_ids, logprobs=logprobs, versions=spans, attempts=attempts, timings=TIMINGS
    )


def make_trajectory(task: Task) -> Trajectory:
    token_ids, logprobs, spans, attempts = arrays(TOKENS)
    return Trajectory(
        task_id=task.task_id,
        batch=task.batch,
        token_ids=token_ids,
        action_mask=~np.isnan(logprobs),
        logprobs=logprobs,
        versions=spans,
        attempts=attempts,
        max_attempts=5,
        reward=-0.5,
        finish_reason=FinishReason.ATTEMPTS,
        replica_id="r",
        timings=TIMINGS,
    )


async def replica(ledger: Ledger, name: str, saves: int) -> None:
    async def live(claim: Claim) -> None:
        for attempt in range(saves):
            await ledger.save(name, claim.entry_id, make_progress(claim.task, TOKENS * (attempt + 1) // (saves + 1)))
        await ledger.complete(claim.entry_id, make_trajectory(claim.task))

    while claims := await ledger.claim(name, 0, CLAIM):
        await asyncio.gather(*(live(claim) for claim in claims))


def make_tasks(num_tasks: int) -> list[Task]:
    return [Task(task_id=i, batch=0, problem="1+1" * 50, gold=("2",), max_attempts=5, seed=i) for i in range(num_tasks)]


async def measure(url: str, *, num_tasks: int, saves: int) -> tuple[float, float]:
    """Round trips a second, and seconds of the server in each."""
    redis = await connect(url)
    await redis.flushall()
    ledger = Ledger(redis, run="bench", lease_s=20, max_deliveries=5)
    await ledger.open()
    tasks = make_tasks(num_tasks)
    started, used = time.monotonic(), await server_seconds(redis)
    for first in range(0, num_tasks, 256):
        await ledger.issue(first, tasks[first : first + 256])
    await asyncio.gather(*(replica(ledger, f"r{i}", saves) for i in range(REPLICAS)))
    taken = 0
    while taken < num_tasks:
        found = await ledger.take("learner", 256, 1.0)
        await ledger.acknowledge([one.entry_id for one in found], through_batch=-1)
        taken += len(found)
    seconds, used = time.monotonic() - started, await server_seconds(redis) - used
    await redis.aclose()
    return num_tasks / seconds, used / num_tasks


async def measure_bare(url: str, *, num_tasks: int) -> float:
    """SET and GET of a task's and a trajectory's bytes, as pairs a second."""
    redis = await connect(url)
    await redis.flushall()
    task = make_tasks(1)[0]
    values = {"task": encode(task), "trajectory": encode(make_trajectory(task))}
    started = time.monotonic()
    for first in range(0, num_tasks, PIPELINE):
        keys = [f"{kind}:{i}" for i in range(first, min(first + PIPELINE, num_tasks)) for kind in values]
        for command in ("set", "get"):
            pipeline = redis.pipeline(transaction=False)
            for key in keys:
                pipeline.set(key, values[key.partition(":")[0]]) if command == "set" else pipeline.get(key)
            await pipeline.execute()
        await redis.delete(*keys)
    seconds = time.monotonic() - started
    await redis.aclose()
    return num_tasks / seconds


async def measure_snapshot(url: str, *, num_trajectories: int) -> float:
    """Seconds of a snapshot of so many trajectories that wait."""
    redis = await connect(url)
    await redis.flushall()
    ledger = Ledger(redis, run="bench", lease_s=20, max_deliveries=5)
    await ledger.open()
    await ledger.issue(0, make_tasks(num_trajectories))
    await replica(ledger, "r", 0)
    started = time.monotonic()
    await ledger.snapshot()
    seconds = time.monotonic() - started
    await redis.aclose()
    return seconds


async def server_seconds(redis) -> float:
    usage = await redis.info("cpu")
    return usage["used_cpu_user"] + usage["used_cpu_sys"]


def show(case: str, ours: float, reference: float, unit: str) -> None:
    line = {"benchmark": "ledger", "case": case, "ours": round(ours), "reference": round(reference)}
    print(json.dumps(line | {"ratio": round(ours / reference, 2), "unit": unit}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=4000)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # the server inherits it: all of it on one core
    with tempfile.TemporaryDirectory() as folder, EmbeddedValkey(Path(folder)) as server:
        bare = asyncio.run(measure_bare(server.url, num_tasks=arguments.tasks))
        found = {saves: asyncio.run(measure(server.url, num_tasks=arguments.tasks, saves=saves)) for saves in (0, 1, 4)}
        waiting = min(1000, arguments.tasks)
        snapshot_s = asyncio.run(measure_snapshot(server.url, num_trajectories=waiting))
    print(f"a snapshot of {waiting} trajectories holds the server for at most {1000 * snapshot_s:.0f} ms")
    for saves, (rate, server_s) in found.items():
        case = f"{TOKENS} tokens, {saves} saved attempts"
        show(f"{case}: clients and server on one core", rate, REQUIRED, "round trips/s")
        show(f"{case}: server alone", 1 / server_s, REQUIRED, "round trips per core-second")
        show(f"{case}: against bare SET and GET", rate, bare, "round trips/s")


if __name__ == "__main__":
    main()
