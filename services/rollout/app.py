"""The HTTP face of a replica: dialogues on request, its weights, health, metrics, and control for those who may.

Errors are problem+json. `docs/rollout-api.md` is the manual; who may control is `access`'s business.
"""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, HTTPException

from services.contracts.telemetry import add_health
from services.contracts.web import BodyLimit, Problem, add_problems
from services.rollout.access import REFUSALS, WHERE, controller_only, is_local
from services.rollout.dialogues import MALFORMED, dialogue_routes
from services.rollout.protocol import (
    MAX_BODY_BYTES,
    DrainResponse,
    PauseResponse,
    ScoreRequest,
    ScoreResponse,
    SwapBody,
    WeightsResponse,
)
from services.rollout.replica import ReplicaProcess
from services.rollout.runner import EngineDead
from services.rollout.weight_control import WeightControl, create_router

PATIENCE_S = 600.0  # for a person's verdict
ENGINE_TIMEOUT_S = 60.0  # of a control call
NOT_READY: dict[int | str, dict[str, Any]] = {
    503: {"model": Problem, "description": "The replica is not ready, or its engine does not answer"}
}
TRANSFER_FAILURES: dict[int | str, dict[str, Any]] = {
    409: {"model": Problem, "description": "Another membership generation, or a version that is not staged here"},
    424: {"model": Problem, "description": "The group broke; this replica saw no fault of its own"},
    500: {"model": Problem, "description": "The swap failed half-way: the replica ends"},
    502: {"model": Problem, "description": "A step failed or took too long; the weights in use stay"},
}

_T = TypeVar("_T")
log = logging.getLogger(__name__)


def create_app(replica: ReplicaProcess, *, patience_s: float = PATIENCE_S) -> FastAPI:
    """All routes of a replica. patience_s: how long a person may think about a verdict."""
    app = FastAPI(
        title="Rollout replica", version="1", summary="Multi-attempt dialogues on vLLM", redirect_slashes=False
    )
    add_problems(app, failed="the replica")
    app.add_middleware(BodyLimit, max_bytes=MAX_BODY_BYTES)
    add_health(app, ready=lambda: replica.refusal)
    weights = replica.weights
    app.include_router(dialogue_routes(replica, patience_s=patience_s))
    app.include_router(_weights(replica, weights))
    token, host = replica.config.rollout.control_token, replica.config.rollout.host
    if not token and not is_local(host, {}):
        log.warning(f"no {WHERE}: control answers only to programs on this machine", extra={"host": host})
    controller = Depends(controller_only(token))
    refusals = {**REFUSALS, **MALFORMED, **NOT_READY}
    app.include_router(_control(replica), dependencies=[controller], responses=refusals)
    app.include_router(
        create_router(weights),
        dependencies=[controller, Depends(_loaded(replica))],
        responses={**refusals, **TRANSFER_FAILURES},
    )
    return app


def _weights(replica: ReplicaProcess, control: WeightControl) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["weights"])

    @router.get("/weights", dependencies=[Depends(_running(replica))], responses=NOT_READY)
    async def weights() -> WeightsResponse:
        """The version that generation uses now, and how it came."""
        history = [SwapBody(**asdict(swap)) for swap in reversed(control.history)]
        newest = history[0] if history else None
        return WeightsResponse(
            version=replica.engine.version,
            step=replica.engine.version,
            device=replica.engine.device,
            model=str(replica.model),
            loaded_at=newest.loaded_at if newest else None,
            digest=newest.digest if newest else None,
            history=history,
        )

    return router


def _control(replica: ReplicaProcess) -> APIRouter:
    router = APIRouter(prefix="/control", tags=["control"])
    running = [Depends(_running(replica))]

    @router.post("/pause", dependencies=running)
    async def pause() -> PauseResponse:
        """Stop generating; requests wait. Weights that are swapped in meanwhile change nothing about it."""
        await _in_time(replica.weights.pause())
        return PauseResponse(paused=True)

    @router.post("/resume", dependencies=running)
    async def resume() -> PauseResponse:
        """Go on generating."""
        await _in_time(replica.weights.resume())
        return PauseResponse(paused=False)

    @router.post("/drain", dependencies=running)
    async def drain() -> DrainResponse:
        """Take no more tasks, finish those in flight, then exit."""
        replica.drain()
        return DrainResponse(in_flight=replica.runner.num_running)

    @router.post("/score", dependencies=running)
    async def score(body: ScoreRequest) -> ScoreResponse:
        """Log-probability of each token given those before it (the first has none), and the version that says so."""
        try:
            logprobs = await _in_time(replica.engine.score(body.token_ids))
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        known = [logprob if math.isfinite(logprob) else None for logprob in logprobs]
        return ScoreResponse(logprobs=known, version=replica.engine.version)

    return router


def _running(replica: ReplicaProcess) -> Callable[[], None]:
    """A dependency that wants a replica whose engine works."""

    def check() -> None:
        if replica.trouble:
            raise HTTPException(503, replica.trouble)

    return check


def _loaded(replica: ReplicaProcess) -> Callable[[], None]:
    """A dependency that wants a replica whose engine is there; the learner itself finds out whether it works."""

    def check() -> None:
        if replica.engine.async_llm is None:
            raise HTTPException(503, replica.trouble or "the model is being loaded")

    return check


async def _in_time(call: Awaitable[_T]) -> _T:
    """Await a call of the engine's. 503 when it does not answer, or is dead."""
    try:
        async with asyncio.timeout(ENGINE_TIMEOUT_S):
            return await call
    except TimeoutError as error:
        raise HTTPException(503, f"the engine did not answer within {ENGINE_TIMEOUT_S:g} s") from error
    except EngineDead as error:
        raise HTTPException(503, str(error)) from error
