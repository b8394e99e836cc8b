"""Random schedules of claim, complete, release, crash and lost replies: no task is lost, none counts twice."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit

import numpy as np
import pytest
from redis.asyncio import Redis

from services.contracts.books import STALE
from services.contracts.ledger import Claim, Ledger
from services.contracts.store import connect
from services.contracts.wire import FinishReason, Task, Timings, Trajectory, VersionSpan

pytestmark = pytest.mark.integration

LEASE_S = 0.04
MAX_DELIVERIES = 3
BATCHES = 3
BATCH_SIZE = 12
WORKERS = 5
DEADLINE_S = 30.0


class Tally:
    """What the test saw happen, to hold the ledger against."""

    def __init__(self) -> None:
        self.issued: list[int] = []
        self.dropped: list[int] = []
        self.trained: list[int] = []
        self.stored: Counter[int] = Counter()  # completions that reported True


def make_ledger(redis: Redis) -> Ledger:
    return Ledger(redis, run="test", lease_s=LEASE_S, max_deliveries=MAX_DELIVERIES)


def task(task_id: int, batch: int) -> Task:
    return Task(task_id=task_id, batch=batch, problem="1+1", gold=("2",), max_attempts=1, seed=task_id)


def trajectory(of: Task) -> Trajectory:
    return Trajectory(
        task_id=of.task_id,
        batch=of.batch,
        token_ids=np.array([5, 6], dtype=np.int32),
        action_mask=np.array([False, True]),
        logprobs=np.array([np.nan, -0.5], dtype=np.float32),
        versions=(VersionSpan(0, 1, 2),),
        attempts=(),
        max_attempts=1,
        reward=-1.0,
        finish_reason=FinishReason.LENGTH,
        replica_id="a",
        timings=Timings(generate_s=0.0, grade_s=0.0, total_s=0.0),
    )


@asynccontextmanager
async def lossy_proxy(url: str, *, chance: random.Random, loss: float) -> AsyncIterator[str]:
    """Forwards to the server, and with probability `loss` cuts the connection instead of delivering a reply."""
    host, port = urlsplit(url).hostname, urlsplit(url).port

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(host, port)

        async def requests() -> None:
            while data := await reader.read(65536):
                back.write(data)
                await back.drain()

        async def replies() -> None:
            while data := await there.read(65536):
                # Setting up a connection is left alone (+OK): otherwise hardly a command would get through.
                if not data.startswith(b"+OK") and chance.random() < loss:
                    return
                writer.write(data)
                await writer.drain()

        running = [asyncio.create_task(requests()), asyncio.create_task(replies())]
        try:
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in running:
                one.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            for end in (writer, back):
                end.close()
                with suppress(ConnectionError):
                    await end.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"


async def run_worker(ledger: Ledger, name: str, tally: Tally, chance: random.Random) -> None:
    """A replica that now and then is slow, gives up, dies, or finds a task impossible."""
    while True:
        claims = await ledger.claim(name, 0, chance.randint(1, 4))
        for claim in claims:
            await handle(ledger, name, claim, tally, chance)
        await asyncio.sleep(0.002)


async def handle(ledger: Ledger, name: str, claim: Claim, tally: Tally, chance: random.Random) -> None:
    fate = chance.random()
    if claim.task.task_id == 0 or fate < 0.1:
        return  # it died with the task in hand; task 0 kills every replica
    if fate < 0.2:
        await ledger.release(name, claim.entry_id, has_failed=chance.random() < 0.5)
        return
    if fate < 0.25:
        await ledger.bury(claim.entry_id, claim.task, "prompt too long")
        return
    if fate < 0.4:
        await asyncio.sleep(LEASE_S * 2)  # the lease runs out; the result comes all the same
    elif fate < 0.6:
        await ledger.renew(name, [claim.entry_id])
    tally.stored[claim.task.task_id] += await ledger.complete(claim.entry_id, trajectory(claim.task))


async def run_learner(redis: Redis, tally: Tally, chance: random.Random) -> None:
    """Issues what is missing, drops some as too old, is killed before some checkpoints, trains each batch once."""
    ledger = make_ledger(redis)
    for batch in range(BATCHES):
        held: dict[str, Trajectory] = {}
        await ledger.open()
        while len(held) < BATCH_SIZE:
            await issue_missing(ledger, batch, tally)
            for entry_id, taken in await ledger.take("learner", BATCH_SIZE - len(held), 0.01):
                if not tally.dropped or chance.random() < 0.1:
                    await ledger.drop([entry_id], STALE)
                    tally.dropped.append(taken.task_id)
                else:
                    held[entry_id] = taken
            if chance.random() < 0.05:
                ledger, held = make_ledger(redis), {}  # killed: a new process takes what is pending
                await ledger.open()
        await ledger.acknowledge(held, through_batch=batch)
        tally.trained += [taken.task_id for taken in held.values()]


async def issue_missing(ledger: Ledger, batch: int, tally: Tally) -> None:
    missing = BATCH_SIZE - (await ledger.live()).get(batch, 0)
    first = await ledger.next_task()
    if missing > 0 and await ledger.issue(first, [task(first + i, batch) for i in range(missing)]) == first + missing:
        tally.issued += range(first, first + missing)


@pytest.mark.parametrize(("seed", "loss"), [(0, 0.0), (1, 0.0), (2, 0.0), (3, 0.05), (4, 0.1), (5, 0.1)])
async def test_each_issued_task_ends_as_one_trajectory_or_one_dead_letter(
    redis_url: str, redis: Redis, seed: int, loss: float
) -> None:
    chance, tally = random.Random(seed), Tally()
    async with lossy_proxy(redis_url, chance=chance, loss=loss) as url:
        client = await connect(redis_url if loss == 0 else url)
        workers = [
            asyncio.create_task(run_worker(make_ledger(client), f"rollout-{i}", tally, chance)) for i in range(WORKERS)
        ]
        try:
            await asyncio.wait_for(run_learner(client, tally, chance), DEADLINE_S)
        finally:
            for worker in workers:
                worker.cancel()
            ended = await asyncio.gather(*workers, return_exceptions=True)
            await client.aclose()
    assert all(isinstance(outcome, asyncio.CancelledError) for outcome in ended), ended
    ledger = make_ledger(redis)
    dead = [letter.task.task_id for letter in await ledger.dead_letters(1000)]
    assert sorted(tally.trained + tally.dropped + dead) == tally.issued == list(range(await ledger.next_task()))
    assert len(tally.trained) == BATCHES * BATCH_SIZE
    assert 0 in dead
    assert tally.dropped
    assert max(tally.stored.values()) == 1
    assert await ledger.live() == {}
    assert (await ledger.depth())[:4] == (0, 0, 0, 0)
