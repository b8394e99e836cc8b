"""The HTTP face of a replica: dialogues on request, its weights, health, and control behind a bearer token."""

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from http import HTTPStatus
from typing import Annotated, Any, TypeVar, cast

from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException as AnyHTTPException

from services.contracts.telemetry import add_health
from services.contracts.wire import Sampling, Task
from services.grader.client import GraderUnavailableError
from services.rollout.replica import ReplicaProcess
from services.rollout.runner import GenerationAborted, UnrunnableTask
from services.rollout.weight_control import create_router

CLIENT_GONE = 499  # nobody reads this answer; it is for logs and counters

_T = TypeVar("_T")


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SamplingBody(_Body):
    """Overrides of the run's sampling settings; temperature 0 is greedy."""

    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: int | None = None


class DialogueRequest(_Body):
    """One dialogue to run now."""

    problem: str
    gold: Annotated[list[str], Field(min_length=1)]
    max_attempts: Annotated[int, Field(ge=1)] = 1
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    sampling: SamplingBody = SamplingBody()


class TurnBody(_Body):
    """One attempt and what the grader said."""

    text: str
    verdict: str
    extracted: str | None
    num_tokens: int
    grading_ms: float


class DialogueResponse(_Body):
    """The finished dialogue."""

    attempts: list[TurnBody]
    reward: float
    finish_reason: str
    num_tokens: int
    weight_versions: list[int]
    seconds: dict[str, float]


class ScoreRequest(_Body):
    """Token ids to be scored."""

    token_ids: Annotated[list[int], Field(min_length=1)]


def create_app(replica: ReplicaProcess) -> FastAPI:
    """All routes of a replica. Errors are problem+json."""
    app = FastAPI(title="rollout", summary="Multi-attempt dialogues on vLLM")
    add_health(app, ready=lambda: replica.refusal)
    app.include_router(_public(replica))
    guarded = Depends(_bearer(replica.config.rollout.control_token))
    app.include_router(_control(replica), dependencies=[guarded, Depends(_running(replica))])
    app.include_router(create_router(replica.engine), dependencies=[guarded])
    app.add_exception_handler(AnyHTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _malformed)
    return app


def _public(replica: ReplicaProcess) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["dialogues"])

    @router.post("/dialogues")
    async def dialogues(body: DialogueRequest, request: Request) -> DialogueResponse:
        """Run one dialogue now, beside those of the ledger; it is given up when the client hangs up."""
        if replica.refusal:
            raise HTTPException(503, replica.refusal)
        task = Task(
            task_id=0,
            batch=0,
            problem=body.problem,
            gold=tuple(body.gold),
            max_attempts=body.max_attempts,
            seed=body.seed,
            kind="eval",
            sampling=Sampling(**body.sampling.model_dump()),
        )
        try:
            trajectory = await _while_connected(request, replica.runner.run(task))
        except UnrunnableTask as error:
            raise HTTPException(422, str(error)) from error
        except (GraderUnavailableError, GenerationAborted) as error:
            raise HTTPException(503, str(error)) from error
        turns = [
            TurnBody(
                text=replica.runner.attempt_text(trajectory, index),
                verdict=attempt.verdict,
                extracted=attempt.extracted,
                num_tokens=attempt.end - attempt.start,
                grading_ms=attempt.grading_ms,
            )
            for index, attempt in enumerate(trajectory.attempts)
        ]
        timings = trajectory.timings
        return DialogueResponse(
            attempts=turns,
            reward=trajectory.reward,
            finish_reason=trajectory.finish_reason,
            num_tokens=len(trajectory.token_ids),
            weight_versions=[span.version for span in trajectory.versions],
            seconds={"generate": timings.generate_s, "grade": timings.grade_s, "total": timings.total_s},
        )

    @router.get("/weights")
    async def weights() -> dict[str, Any]:
        """The version that generation uses now."""
        return {"version": replica.engine.version, "device": replica.engine.device}

    return router


def _control(replica: ReplicaProcess) -> APIRouter:
    router = APIRouter(prefix="/control", tags=["control"])

    @router.post("/pause")
    async def pause() -> dict[str, Any]:
        """Stop generating; requests wait."""
        await replica.engine.async_llm.pause_generation(mode="keep", clear_cache=False)
        return {"paused": True}

    @router.post("/resume")
    async def resume() -> dict[str, Any]:
        """Go on generating."""
        await replica.engine.async_llm.resume_generation()
        return {"paused": False}

    @router.post("/drain")
    async def drain() -> dict[str, Any]:
        """Take no more tasks, finish those in flight, then exit."""
        replica.drain()
        return {"in_flight": replica.runner.num_running}

    @router.post("/score")
    async def score(body: ScoreRequest) -> dict[str, Any]:
        """Log-probability of each token given those before it (the first has none), and the version that says so."""
        logprobs = await replica.engine.score(body.token_ids)
        return {"logprobs": [None, *logprobs[1:]], "version": replica.engine.version}

    return router


def _running(replica: ReplicaProcess) -> Any:
    """A dependency that wants a replica whose engine works."""

    def check() -> None:
        if replica.trouble:
            raise HTTPException(503, replica.trouble)

    return check


def _bearer(token: str) -> Any:
    """A dependency that wants `Authorization: Bearer <token>`; without a token configured, control is closed."""

    def check(authorization: Annotated[str, Header()] = "") -> None:
        given = authorization.removeprefix("Bearer ")
        if not token or not hmac.compare_digest(given.encode(), token.encode()):
            raise HTTPException(401, "control needs the bearer token rollout.control_token")

    return check


async def _while_connected(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """Await `work`, but cancel it when the client hangs up: FastAPI would let it run, and the engine sample, on."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request.receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise HTTPException(CLIENT_GONE, "the client hung up")
        return working.result()
    finally:
        for future in (working, leaving):
            future.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Callable[[], Awaitable[Mapping[str, Any]]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _problem(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    title = HTTPStatus(status).phrase if status in set(HTTPStatus) else detail
    body = {"type": "about:blank", "title": title, "status": status, "detail": detail}
    return JSONResponse(body, status_code=status, headers=headers, media_type="application/problem+json")


async def _http_error(_: Request, error: Exception) -> Response:
    error = cast(AnyHTTPException, error)
    return _problem(error.status_code, str(error.detail), error.headers)


async def _malformed(_: Request, error: Exception) -> Response:
    first = cast(RequestValidationError, error).errors()[0]
    return _problem(422, f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}")
