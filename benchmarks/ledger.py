"""How many tasks the ledger moves on one core, whole lives counted: `python -m benchmarks.ledger`.

A real Valkey; one client process plays learner and replicas. Each task is issued, claimed (16 at a time), saved after
each of its unfinished attempts, completed with a trajectory of TOKENS tokens, taken and acknowledged. The last lines
are one JSON object per case; the reference is what 1,000 dialogues a second need (design.md, section 7).
"""

import argparse
import asyncio
import json
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
)

TOKENS = 1000
REPLICAS, CLAIM = 4, 16
NEEDED = 2000  # operations a second: a task and a trajectory for each of 1,000 dialogues
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


async def measure(url: str, *, num_tasks: int, saves: int) -> tuple[float, float]:
    """Dialogues a second, and the server's share of one core."""
    redis = await connect(url)
    await redis.flushall()
    ledger = Ledger(redis, run="bench", lease_s=20, max_deliveries=5)
    await ledger.open()
    tasks = [
        Task(task_id=i, batch=0, problem="1+1" * 50, gold=("2",), max_attempts=5, seed=i) for i in range(num_tasks)
    ]
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


async def server_seconds(redis) -> float:
    usage = await redis.info("cpu")
    return usage["used_cpu_user"] + usage["used_cpu_sys"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=4000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, EmbeddedValkey(Path(folder)) as server:
        for saves in (0, 1, 4):
            rate, server_s = asyncio.run(measure(server.url, num_tasks=arguments.tasks, saves=saves))
            ours = 2 / server_s
            line = {"benchmark": "ledger", "case": f"{saves} saved attempts a dialogue", "ours": round(ours)}
            line |= {
                "reference": NEEDED,
                "ratio": round(ours / NEEDED, 2),
                "unit": "tasks+trajectories per core-second",
            }
            print(json.dumps(line | {"dialogues_per_s_one_python_client": round(rate)}))


if __name__ == "__main__":
    main()
