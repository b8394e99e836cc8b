"""The replica's end of a weight transfer: four control routes that drive vLLM's weight-transfer calls.

Each step has a deadline; whatever fails, generation goes on with the weights in use. Only a failure inside the swap
itself, when the model may be half loaded, marks the engine as broken: readiness fails and a supervisor restarts it.
Staging "direct" has no other steps than the swap: vLLM's own engine loads what it receives.
"""

import asyncio
import functools
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fastapi import APIRouter, HTTPException
from prometheus_client import Counter, Histogram

from services.contracts.weights.protocol import Abort, Commit, Join, Prepare

STATUS_PERIOD_S = 0.004  # between looks at a reception: a worker call each, about a millisecond
RPC_TIMEOUT_S = 10.0  # of worker calls that move no bytes, beside what they wait for
HISTORY = 10  # swaps that are remembered
BLAMELESS = 424  # the group failed, and this member saw no fault of its own

SWAPS = Counter("multiattempt_rollout_weight_swaps_total", "Versions that were to be swapped in", ["outcome"])
MISMATCHES = Counter("multiattempt_rollout_weight_mismatches_total", "Versions refused: other bytes than were sent")
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
    digest: str  # the version's fingerprint, computed of the bytes received
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
    """Join, prepare, commit, abort: one transfer at a time, in the current membership generation.

    Whoever stops generation by `pause` finds it stopped until `resume`, whatever is swapped in meanwhile.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._generation = -1
        self._direct = False
        self._prepared: Prepare | None = None
        self._staged: dict[str, Any] = {}  # how it came there
        self.history: deque[Swap] = deque(maxlen=HISTORY)  # the newest last
        self.fingerprint = ""  # of the weights in use; empty: those that the engine started with
        self.is_delivered = False  # the learner itself has brought a version
        self.is_paused = False  # by somebody's wish
        self._transferring = asyncio.Lock()
        self._stopping = asyncio.Lock()  # held while generation is stopped or let go on

    @property
    def version(self) -> int:
        """Of the weights in use."""
        return self._engine.version

    async def join(self, join: Join) -> dict[str, Any]:
        """Leave whatever group there was and enter this one. 409 for an older generation, 502 if it does not form."""
        if join.generation < self._generation:
            raise HTTPException(409, f"generation {join.generation} is over, this replica is in {self._generation}")
        async with self._transferring:
            await self._forget()
            self._generation, self._direct = join.generation, join.staging == "direct"
            await self._step("join", self._enter(join), join.rendezvous_s + RPC_TIMEOUT_S)
        return {"generation": self._generation}

    async def prepare(self, prepare: Prepare) -> dict[str, Any]:
        """Receive a version while generation goes on; answers when it is staged and intact.

        424 when the group broke, 502 when this replica failed or was sent something else.
        """
        self._check(prepare.generation)
        async with self._transferring:
            self._staged = {"receive_s": 0.0, "fingerprint": ""}
            if not self._direct:
                await self._step(
                    "prepare", self._update({"prepare": prepare.model_dump()}, RPC_TIMEOUT_S), RPC_TIMEOUT_S
                )
                self._staged = await self._step("prepare", self._received(), prepare.deadline_s)
                RECEIVE_SECONDS.observe(self._staged["receive_s"])
            self._prepared = prepare
        return self._staged

    async def commit(self, commit: Commit) -> dict[str, Any]:
        """Pause, load the staged version, resume. 409 when that version is not staged, 500 when the load failed."""
        self._check(commit.generation)
        prepared = self._prepared
        if prepared is None or prepared.version != commit.version:
            raise HTTPException(409, f"version {commit.version} is not staged here")
        if not self._direct and self._staged["fingerprint"] != commit.fingerprint:
            raise HTTPException(409, f"staged is {self._staged['fingerprint']}, not {commit.fingerprint}")
        async with self._transferring:
            load = functools.partial(self._finish, commit, prepared)
            done = await self._swap(commit, prepared.plan().num_bytes, load)
        self.is_delivered = True
        return done

    async def load_file(self, path: Path, commit: Commit, *, num_bytes: int) -> None:
        """Load a version that the learner published as a file. Raises HTTPException.

        commit: its generation is of no matter.
        """
        async with self._transferring:
            await self._step(
                "read", self._engine.rpc("weights_stage_file", {"path": str(path)}, RPC_TIMEOUT_S), RPC_TIMEOUT_S
            )
            self._staged = await self._step("read", self._received(), commit.load_s)
            if self._staged["fingerprint"] != commit.fingerprint:
                await self._forget()
                raise HTTPException(409, f"{path} is {self._staged['fingerprint']}, not {commit.fingerprint}")
            await self._swap(commit, num_bytes, functools.partial(self._finish_file, commit))

    async def abort(self, abort: Abort) -> dict[str, Any]:
        """Leave the group; the weights in use stay."""
        await self._forget()
        return {"version": self._engine.version}

    async def pause(self) -> None:
        """Stop generating until `resume`; requests wait."""
        async with self._stopping:
            await self._engine.async_llm.pause_generation(mode="keep", clear_cache=False)
            self.is_paused = True

    async def resume(self) -> None:
        """Go on generating."""
        async with self._stopping:
            await self._engine.async_llm.resume_generation()
            self.is_paused = False

    async def _enter(self, join: Join) -> None:
        init_info: dict[str, Any] = {"join": join.model_dump()}
        if join.staging == "direct":
            from services.contracts.weights.communicator import await_all, meet

            count = self._engine.async_llm.vllm_config.parallel_config.world_size
            store = await asyncio.to_thread(meet, join)
            await asyncio.to_thread(await_all, store, join, count=count)
            init_info = {
                "nccl_unique_id_b64": join.nccl_id,
                "rank_offset": join.rank,
                "world_size": join.world_size,
                "packed": True,
                "packed_buffer_size_bytes": join.direct_bytes,
            }
        await self._engine.rpc(
            "init_weight_transfer_engine", {"init_info": init_info}, join.rendezvous_s + RPC_TIMEOUT_S
        )
        if not self._direct:
            await self._until("joined")

    async def _update(self, update_info: dict[str, Any], timeout_s: float) -> None:
        """vLLM's worker calls: staged engines begin to receive, the direct one receives and loads."""
        await self._engine.rpc("start_weight_update", {}, RPC_TIMEOUT_S)
        await self._engine.rpc("update_weights", {"update_info": update_info}, timeout_s)

    async def _finish(self, commit: Commit, prepared: Prepare) -> None:
        if self._direct:
            info = {"names": prepared.names, "dtype_names": prepared.dtypes, "shapes": prepared.shapes}
            await self._update(info, commit.load_s)
        await self._engine.rpc("finish_weight_update", {}, commit.load_s)
        if self._direct:
            statuses = await self._engine.rpc("weights_status", {}, RPC_TIMEOUT_S)
            self._staged["fingerprint"] = ",".join(sorted({status["fingerprint"] for status in statuses}))
        await self._engine.async_llm.update_weight_version(str(commit.version))

    async def _finish_file(self, commit: Commit) -> None:
        await self._engine.rpc("weights_finish_file", {}, commit.load_s)
        await self._engine.async_llm.update_weight_version(str(commit.version))

    async def _swap(self, commit: Commit, num_bytes: int, load: Callable[[], Awaitable[object]]) -> dict[str, Any]:
        """Stop generation, load, let it go on unless somebody wants it stopped."""
        llm = self._engine.async_llm
        async with self._stopping:
            started = time.monotonic()
            try:
                # Requests that somebody stopped must not be let go on to their end. The cache goes: keys and values of
                # the old weights would answer for the new ones.
                mode = "keep" if self.is_paused else commit.mode
                pause = llm.pause_generation(mode=mode, clear_cache=True)
                await self._step("pause", pause, RPC_TIMEOUT_S + commit.drain_s)
                paused = time.monotonic()
                await self._whole_or_broken(commit, load)
            finally:
                if not self.is_paused:
                    await llm.resume_generation()
        now = time.monotonic()
        self._engine.version, self.fingerprint, self._prepared = commit.version, commit.fingerprint, None
        PAUSE_SECONDS.observe(now - started)
        SWAPS.labels("swapped").inc()
        swap_s, receive_s = now - paused, self._staged["receive_s"]
        self.history.append(
            Swap(commit.version, datetime.now(UTC), commit.fingerprint, num_bytes, receive_s, now - started, swap_s)
        )
        return {"version": commit.version, "pause_s": paused - started, "swap_s": swap_s}

    async def _whole_or_broken(self, commit: Commit, load: Callable[[], Awaitable[object]]) -> None:
        try:
            async with asyncio.timeout(commit.load_s):
                await load()
            if (found := self._staged["fingerprint"]) != commit.fingerprint:  # direct: known only now
                MISMATCHES.inc()
                raise RuntimeError(f"loaded is {found}, not {commit.fingerprint}")
        except Exception as error:
            SWAPS.labels("broken").inc()
            self._engine.broken = f"the swap to version {commit.version} failed half-way: {error!r}"
            raise HTTPException(500, self._engine.broken) from error

    def _check(self, generation: int) -> None:
        if generation != self._generation:
            raise HTTPException(409, f"this replica is in generation {self._generation}, not {generation}")

    async def _received(self) -> dict[str, Any]:
        statuses = await self._until("staged")
        received = {name: max(status[name] for status in statuses) for name in ("receive_s", "fingerprint_s")}
        return received | {"fingerprint": ",".join(sorted({status["fingerprint"] for status in statuses}))}

    async def _until(self, state: str) -> list[dict[str, Any]]:
        """All workers' status, once it is this one. Raises _GroupFailed, RuntimeError."""
        while True:
            statuses = await self._engine.rpc("weights_status", {}, RPC_TIMEOUT_S)
            failed = [status for status in statuses if status["state"] in ("failed", "idle")]
            if failed:
                raise _failure(failed)
            if all(status["state"] == state for status in statuses):
                return statuses
            await asyncio.sleep(STATUS_PERIOD_S)

    async def _forget(self) -> None:
        self._prepared = None
        await self._engine.rpc("weights_abort", {}, RPC_TIMEOUT_S)

    async def _step(self, what: str, call: Awaitable[_T], deadline_s: float) -> _T:
        """Await one step of a transfer; any failure forgets the transfer and becomes a 424 or 502 for the learner."""
        try:
            async with asyncio.timeout(deadline_s):  # `wait_for` may miss a cancellation
                return await call
        except Exception as error:
            log.warning("weight transfer failed", extra={"step": what, "error": repr(error)})
            SWAPS.labels(f"failed to {what}").inc()
            await self._forget()
            reason = f"no answer within {deadline_s:g} s" if isinstance(error, TimeoutError) else repr(error)
            status = BLAMELESS if isinstance(error, _GroupFailed) else 502
            raise HTTPException(status, f"{what}: {reason}") from error


class _GroupFailed(RuntimeError):
    """Workers saw their group break."""


def _failure(failed: list[dict[str, Any]]) -> RuntimeError:
    """What failed statuses amount to. A worker's own fault outweighs what it did to the others."""
    faults = [status for status in failed if status["kind"] != "PeerError"]
    MISMATCHES.inc(sum(status["kind"] == "MismatchError" for status in faults))
    told = (faults or failed)[0]
    error = f"{told['kind']}: {told['error']}" if told["kind"] else "the reception was abandoned"
    return RuntimeError(error) if faults else _GroupFailed(error)


def create_router(control: WeightControl) -> APIRouter:
    """The routes under /control/weights. Who may call them is the application's business: `access`."""
    router = APIRouter(prefix="/control/weights", tags=["weights"])
    for handler in (control.join, control.prepare, control.commit, control.abort):
        router.add_api_route(f"/{handler.__name__}", handler, methods=["POST"])
    return router
