"""The replica's end of a weight transfer: four control routes that drive vLLM's weight-transfer calls.

Each step has a deadline; whatever fails, generation goes on with the weights in use. Only a failure inside the swap
itself, when the model may be half loaded, marks the engine as broken: readiness fails and a supervisor restarts it.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol, TypeVar

from fastapi import APIRouter, HTTPException
from prometheus_client import Counter, Histogram
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest

from services.contracts.weights.protocol import Abort, Commit, Join, Prepare

STATUS_PERIOD_S = 0.01  # between looks at a reception: a worker call each, about a millisecond
RPC_TIMEOUT_S = 10.0  # of worker calls that do no transfer
PAUSE_TIMEOUT_S = 60.0  # mode "wait" lets running requests finish first
RENDEZVOUS_GRACE_S = 5.0  # the worker's own deadline fires first; this one catches a worker that hangs
HISTORY = 10  # swaps that are remembered

SWAPS = Counter("multiattempt_rollout_weight_swaps_total", "Versions that were to be swapped in", ["outcome"])
PAUSE_SECONDS = Histogram(
    "multiattempt_rollout_weight_pause_seconds",
    "How long generation stood still for a swap",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
RECEIVE_SECONDS = Histogram(
    "multiattempt_rollout_weight_receive_seconds",
    "How long a version took to come in, while generation went on",
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
)

log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Swap:
    """One version that was swapped in."""

    version: int
    loaded_at: datetime
    digest: str  # of the bytes received, as the learner sent them
    num_bytes: int
    receive_s: float  # while generation went on
    pause_s: float  # generation stood still: the swap is part of it
    swap_s: float


class Engine(Protocol):
    """What is needed of the engine."""

    version: int
    broken: str  # why the engine must be restarted; empty: it is fine

    @property
    def async_llm(self) -> Any:
        """vLLM's AsyncLLM."""

    async def rpc(self, method: str, kwargs: dict[str, Any], timeout_s: float) -> list[Any]:
        """Call a method of every worker."""


class WeightControl:
    """Join, prepare, commit, abort: one transfer at a time, in the current membership generation."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._generation = -1
        self._prepared = -1  # version in the staging buffer
        self._staged: dict[str, Any] = {}  # how it came there
        self.history: deque[Swap] = deque(maxlen=HISTORY)  # the newest last
        self._timeout_s = RPC_TIMEOUT_S
        self._lock = asyncio.Lock()

    async def join(self, join: Join) -> dict[str, Any]:
        """Leave whatever group there was and enter this one. 409 for an older generation, 502 if it does not form."""
        if join.generation < self._generation:
            raise HTTPException(409, f"generation {join.generation} is over, this replica is in {self._generation}")
        async with self._lock:
            await self._forget()
            self._generation, self._timeout_s = join.generation, join.timeout_s
            request = WeightTransferInitRequest(init_info={"join": join.model_dump()})
            deadline_s = join.rendezvous_s + RENDEZVOUS_GRACE_S
            await self._step("join", self._engine.async_llm.init_weight_transfer_engine(request), deadline_s)
        return {"generation": self._generation}

    async def prepare(self, prepare: Prepare) -> dict[str, Any]:
        """Receive a version while generation goes on; answers when it is staged and intact, 502 if it is not."""
        self._check(prepare.generation)
        async with self._lock:
            llm = self._engine.async_llm
            request = WeightTransferUpdateRequest(update_info={"prepare": prepare.model_dump()})
            await self._step("prepare", llm.start_weight_update(), RPC_TIMEOUT_S)
            await self._step("prepare", llm.update_weights(request), RPC_TIMEOUT_S)
            plan = prepare.plan()
            num_buckets = -(-plan.num_bytes // plan.bucket_bytes) + 1
            self._staged = await self._step("prepare", self._received(), num_buckets * self._timeout_s)
            self._staged["num_bytes"] = plan.num_bytes
            RECEIVE_SECONDS.observe(self._staged["receive_s"])
            self._prepared = prepare.version
        return self._staged

    async def commit(self, commit: Commit) -> dict[str, Any]:
        """Pause, load the staged version, resume. 409 when that version is not staged, 500 when the load failed."""
        self._check(commit.generation)
        if self._prepared != commit.version:
            raise HTTPException(409, f"version {commit.version} is not staged here")
        async with self._lock:
            llm, started = self._engine.async_llm, time.monotonic()
            try:
                # The cache goes: keys and values of the old weights would answer for the new ones.
                pause = llm.pause_generation(mode=commit.mode, clear_cache=True)
                await self._step("pause", pause, PAUSE_TIMEOUT_S)
                paused = time.monotonic()
                await self._swap(commit.version)
            finally:
                await llm.resume_generation()
        now = time.monotonic()
        PAUSE_SECONDS.observe(now - started)
        SWAPS.labels("swapped").inc()
        swap_s, loaded_at = now - paused, datetime.now(UTC)
        swap = Swap(commit.version, loaded_at, **self._staged, pause_s=now - started, swap_s=swap_s)
        self.history.append(swap)
        return {"version": commit.version, "pause_s": paused - started, "swap_s": now - paused}

    async def abort(self, abort: Abort) -> dict[str, Any]:
        """Leave the group; the weights in use stay."""
        await self._forget()
        return {"version": self._engine.version}

    async def _swap(self, version: int) -> None:
        call = self._engine.async_llm.finish_weight_update(str(version))
        try:
            await asyncio.wait_for(call, RPC_TIMEOUT_S + self._timeout_s)
        except Exception as error:
            SWAPS.labels("broken").inc()
            self._engine.broken = f"the swap to version {version} failed half-way: {error!r}"
            raise HTTPException(500, self._engine.broken) from error
        self._engine.version, self._prepared = version, -1

    def _check(self, generation: int) -> None:
        if generation != self._generation:
            raise HTTPException(409, f"this replica is in generation {self._generation}, not {generation}")

    async def _received(self) -> dict[str, Any]:
        while True:
            statuses = await self._engine.rpc("weights_status", {}, RPC_TIMEOUT_S)
            failed = [status["error"] for status in statuses if status["state"] in ("failed", "idle")]
            if failed:
                raise RuntimeError(failed[0] or "the reception was abandoned")
            if all(status["state"] == "staged" for status in statuses):
                received = {"receive_s": max(status["receive_s"] for status in statuses)}
                return received | {"digest": ",".join(sorted({status["digest"] for status in statuses}))}
            await asyncio.sleep(STATUS_PERIOD_S)

    async def _forget(self) -> None:
        self._prepared = -1
        await self._engine.rpc("weights_abort", {}, RPC_TIMEOUT_S)

    async def _step(self, what: str, call: Awaitable[_T], deadline_s: float) -> _T:
        """Await one step of a transfer; any failure forgets the transfer and becomes a 502 for the learner."""
        try:
            return await asyncio.wait_for(call, deadline_s)
        except Exception as error:
            log.warning("weight transfer failed", extra={"step": what, "error": repr(error)})
            SWAPS.labels(f"failed to {what}").inc()
            await self._forget()
            reason = f"no answer within {deadline_s:g} s" if isinstance(error, TimeoutError) else repr(error)
            raise HTTPException(502, f"{what}: {reason}") from error


def create_router(control: WeightControl) -> APIRouter:
    """The routes under /control/weights. Who may call them is the application's business: `access`."""
    router = APIRouter(prefix="/control/weights", tags=["weights"])
    for handler in (control.join, control.prepare, control.commit, control.abort):
        router.add_api_route(f"/{handler.__name__}", handler, methods=["POST"])
    return router
