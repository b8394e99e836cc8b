"""A replica without vLLM, to be killed often: the real claim loop, runner, ledger and registry around a slow engine.

`fake_replica.py REDIS_URL RUN REPLICA_ID VERSION`. What it samples cannot come twice by chance: log-probabilities are
random, the weight version tells the process. Each attempt that begins is counted in the hash `begun`, by its seed.
"""

import asyncio
import os
import random
import sys
import time

from redis.asyncio import Redis

from services.contracts.config import load
from services.contracts.ledger import Ledger
from services.contracts.registry import Registry, Replica
from services.contracts.store import connect
from services.contracts.wire import Verdict
from services.grader.client import Grade
from services.rollout.ending import Signals
from services.rollout.runner import Completion, DialogueRunner
from services.rollout.worker import Worker

LEASE_S = 1.0
MAX_IN_FLIGHT = 16
GRACE_S = 0.3  # shorter than a dialogue
TOKEN_S = 0.02
TTL_S = 1.0


class ByteTokenizer:
    """A token is a byte, and a turn is what is between `<` and `>`."""

    chat_template = None
    eos_token_id = 0
    all_special_ids = (0,)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: list[int], **_: object) -> str:
        return bytes(token_ids).decode(errors="replace")

    def convert_ids_to_tokens(self, token_ids: list[int]) -> list[str]:
        return [chr(token) for token in token_ids]


class SlowEngine:
    """A box after some digits, a token at a time."""

    def __init__(self, redis: Redis, version: int) -> None:
        self._redis, self.version = redis, version

    async def sample(self, token_ids, *, max_tokens, seed, sampling, stop_ids, is_last) -> Completion:
        await self._redis.hincrby("begun", str(seed), 1)
        sampled: list[int] = []
        for token in ("1" * random.randint(1, 12) + "\\boxed{3}").encode():
            await asyncio.sleep(TOKEN_S)
            sampled.append(token)
            if is_last(token):
                break
        return Completion(sampled, [-random.random() for _ in sampled], [(self.version, 0, len(sampled))])


class StrictGrader:
    """Nothing is ever right."""

    async def grade(self, response: str, gold: tuple[str, ...]) -> Grade:
        await asyncio.sleep(0.005)
        return Grade(Verdict.INCORRECT, correct=False, extracted="3", method="exact", elapsed_ms=5.0, cached=False)


async def main(url: str, run: str, replica_id: str, version: int, signals: Signals) -> None:
    redis = await connect(url)
    config = load(None, ["--dialogue.template=paper", "--model.max_model_len=4096"], env={})
    runner = DialogueRunner(
        config,
        engine=SlowEngine(redis, version),
        grader=StrictGrader(),
        tokenizer=ByteTokenizer(),
        replica_id=f"{replica_id} {version}",
    )
    worker = Worker(
        Ledger(redis, run=run, lease_s=LEASE_S, max_deliveries=5),
        runner,
        replica_id=replica_id,
        version=lambda: version,
        free_places=lambda in_flight, _: MAX_IN_FLIGHT - in_flight,
        lease_s=LEASE_S,
        grader_timeout_s=10.0,
    )
    loop = asyncio.get_running_loop()
    signals.ask = lambda: loop.call_soon_threadsafe(worker.drain, GRACE_S)
    registry = Registry(redis, run=run)
    beating = asyncio.create_task(beat(registry, replica_id, version))
    try:
        await worker.run()
    finally:
        beating.cancel()
        await asyncio.gather(beating, return_exceptions=True)
        await registry.withdraw(replica_id)
        await redis.aclose()


async def beat(registry: Registry, replica_id: str, version: int) -> None:
    started = time.time()
    while True:
        replica = Replica(
            replica_id=replica_id,
            url="http://nowhere",
            world_size=1,
            version=version,
            device="cpu",
            state="ready",
            pid=os.getpid(),
            started_at=started,
        )
        await registry.announce(replica, TTL_S)
        await asyncio.sleep(TTL_S / 3)


if __name__ == "__main__":
    url, run, replica_id, version = sys.argv[1:]
    asyncio.run(main(url, run, replica_id, int(version), Signals()))
