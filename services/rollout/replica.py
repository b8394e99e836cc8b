"""One replica's life: engine up, announced, working, drained, withdrawn. Wires the parts together."""

import asyncio
import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from redis.asyncio import Redis

from services.contracts.config import RunConfig
from services.contracts.ledger import Ledger
from services.contracts.observations import Figure, Observations, Reporter
from services.contracts.registry import Registry, Replica
from services.contracts.store import connect
from services.grader.client import GraderClient
from services.rollout.admission import Admission
from services.rollout.newcomer import Newcomer
from services.rollout.runner import DialogueRunner, EngineDead
from services.rollout.vitals import VitalSigns
from services.rollout.vllm_engine import VllmEngine
from services.rollout.weight_control import WeightControl
from services.rollout.worker import Worker

MISSED_HEARTBEATS = 3  # after so many a replica is taken for dead
ENGINE_SILENCE_S = 60.0  # an engine that answers nothing for so long will not do so again
DRAIN_PERIOD_S = 0.05  # between looks at the last dialogues

log = logging.getLogger(__name__)


class ReplicaProcess:
    """The parts of one replica. `trouble` is why it is not ready, None when it is."""

    def __init__(self, config: RunConfig, *, model: Path, replica_id: str, url: str) -> None:
        self.config, self.model = config, model
        self.engine = VllmEngine(config, model)
        self.runner: DialogueRunner
        self.worker: Worker
        self.admission: Admission
        self.trouble: str | None = "the model is being loaded"
        self.done = asyncio.Event()
        self._replica_id, self._url = replica_id, url
        self._started_at = time.time()
        self._may_claim: Callable[[], bool] = lambda: True

    async def run(self) -> None:
        """Live until drained. Raises what the replica cannot survive; a supervisor restarts it."""
        started = time.monotonic()
        redis = await connect(self.config.redis.url)
        grader = GraderClient(self.config.grader.url, deadline_s=self.config.rollout.grader_timeout_s)
        registry = Registry(redis, run=self.config.run.name)
        try:
            await self.engine.start()
            self._wire(
                Ledger(
                    redis,
                    run=self.config.run.name,
                    lease_s=self.config.redis.lease_s,
                    max_deliveries=self.config.redis.max_deliveries,
                ),
                grader,
            )
            newcomer = Newcomer(self.config, registry, self.weights)
            await newcomer.load_file()
            self._may_claim = lambda: newcomer.may_claim
            await self._announce(registry)
            await newcomer.look()
            self.trouble = None
            phases = {name: round(seconds, 1) for name, seconds in self.engine.phases.items()}
            log.info(
                "replica ready", extra={"seconds": round(time.monotonic() - started, 1), **phases, "url": self._url}
            )
            beating = asyncio.create_task(self._beat(registry, newcomer))
            working = asyncio.create_task(self._work())
            try:
                async with self._reporter(redis):
                    done, _ = await asyncio.wait((beating, working), return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        task.result()
            finally:
                self.trouble = "the replica is stopping"
                for task in (beating, working):
                    task.cancel()
                await asyncio.gather(beating, working, return_exceptions=True)
                await registry.withdraw(self._replica_id)
        finally:
            self.done.set()
            with contextlib.suppress(OSError):
                await grader.close()
            await redis.aclose()
            self.engine.stop()

    @functools.cached_property
    def weights(self) -> WeightControl:
        """The engine's weights, and what is done to them."""
        return WeightControl(self.engine)

    @property
    def refusal(self) -> str | None:
        """Why no new dialogue can be asked for; None when one can."""
        if self.trouble is None and self.worker.is_draining:
            return "the replica is draining"
        return self.trouble

    def drain(self) -> None:
        """Claim nothing more, finish what is in flight or give it back when the grace period is over, then end."""
        self.worker.drain(self.config.rollout.drain_grace_s)

    async def _work(self) -> None:
        """Until drained: first the ledger's dialogues, then those asked for over HTTP, which begin no more."""
        await self.worker.run()
        while self.runner.num_running and not self.worker.is_grace_over:
            await asyncio.sleep(DRAIN_PERIOD_S)

    def _reporter(self, redis: Redis) -> Reporter:
        signs = VitalSigns()

        async def vitals() -> Mapping[str, Figure]:
            return {"trouble": self.trouble, **signs()}

        observations = Observations(redis, run=self.config.run.name)
        return Reporter(observations, name=self._replica_id, service="rollout", vitals=vitals)

    def _wire(self, ledger: Ledger, grader: GraderClient) -> None:
        self.runner = DialogueRunner(
            self.config,
            engine=self.engine,
            grader=grader,
            tokenizer=self.engine.tokenizer,
            replica_id=self._replica_id,
        )
        self.admission = Admission(
            max_num_seqs=self.config.rollout.max_num_seqs,
            capacity_tokens=self.engine.capacity_tokens,
            max_model_len=self.config.model.max_model_len,
        )
        self.worker = Worker(
            ledger,
            self.runner,
            replica_id=self._replica_id,
            version=lambda: self.engine.version,
            free_places=self._free_places,
            lease_s=self.config.redis.lease_s,
            grader_timeout_s=self.config.rollout.grader_timeout_s,
        )

    def _free_places(self, in_flight: int, num_completed: int) -> int:
        if not self._may_claim():
            return 0
        stats = self.engine.stats
        free = self.admission.free(
            self.runner.num_sampled,
            num_attempts=self.runner.num_attempts,
            num_completed=num_completed,
            num_preemptions=stats.num_preemptions,
            kv_cache_used=stats.take_peak(),
            now_s=time.monotonic(),
        )
        return min(free, self.config.rollout.max_in_flight - in_flight)

    async def _beat(self, registry: Registry, newcomer: Newcomer) -> None:
        """Announce this replica as long as its engine answers; one that hangs falls silent, and is given up in the end.

        Raises EngineDead.
        """
        answered = time.monotonic()
        while True:
            try:
                self.trouble = await self.engine.check() or None
                if self.trouble and time.monotonic() - answered > ENGINE_SILENCE_S:
                    raise EngineDead(self.trouble)
            except EngineDead:
                self.worker.is_engine_dead = True
                raise
            if self.engine.broken:
                raise RuntimeError(self.engine.broken)
            if self.trouble is None:
                answered = time.monotonic()
                await self._announce(registry)
                await newcomer.look()
            await asyncio.sleep(self.config.rollout.heartbeat_s)

    async def _announce(self, registry: Registry) -> None:
        replica = Replica(
            replica_id=self._replica_id,
            url=self._url,
            world_size=self.config.rollout.tensor_parallel_size,
            version=self.engine.version,
            fingerprint=self.weights.fingerprint,
            device=self.engine.device,
            state="draining" if self.worker.is_draining else "ready",
            pid=os.getpid(),
            started_at=self._started_at,
        )
        await registry.announce(replica, MISSED_HEARTBEATS * self.config.rollout.heartbeat_s)
