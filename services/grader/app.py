"""The FastAPI application: `POST /v1/grade`, `/v1/grade/batch`, `/get_reward`, health, metrics, OpenAPI docs.

Errors are problem+json (RFC 9457). An item that cannot be graded is a 200 with its verdict; 4xx is for malformed
requests, 503 with Retry-After for a full queue. Grading itself is `judge`'s.
"""

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Annotated, Any, cast

from fastapi import Body, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.contracts.settings import GraderSection
from services.contracts.telemetry import add_health
from services.grader.answer import Extraction
from services.grader.judge import Judge, Question
from services.grader.pool import Pool, PoolBusyError
from services.grader.protocol import (
    BatchRequest,
    BatchResult,
    GradeRequest,
    GradeResult,
    OpenRlhfRequest,
    OpenRlhfResult,
    SlimeRequest,
    SlimeResult,
    golds_of,
)

MAX_BODY_BYTES = 32 * 2**20
RETRY_AFTER_S = 1

_SPECIAL_TOKEN = re.compile(r"<\|[A-Za-z0-9_ ]{1,40}\|>|</?s>|<pad>|<eos>|<bos>")
_PROBLEM = {"application/problem+json": {"schema": {"type": "object"}}}
_ERRORS: dict[int | str, dict[str, Any]] = {
    413: {"description": "The body is too large", "content": _PROBLEM},
    422: {"description": "The request is malformed", "content": _PROBLEM},
    503: {"description": "The queue is full; try again after Retry-After seconds", "content": _PROBLEM},
}


def create_app(config: GraderSection) -> FastAPI:
    """Build the application; its worker processes live from start-up to shut-down."""
    pool = Pool(
        workers=config.workers,
        timeout_s=config.timeout_s,
        queue_size=config.queue_size,
        worker_memory_mb=config.worker_memory_mb,
        worker_max_items=config.worker_max_items,
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await pool.start()
        try:
            yield
        finally:
            await pool.close()

    app = FastAPI(title="Math grader", version="1", description=__doc__ or "", lifespan=lifespan)
    app.state.pool = pool
    app.add_middleware(_BodyLimit)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(PoolBusyError, _busy)
    app.add_exception_handler(Exception, _internal)
    add_health(app, pool.not_ready)
    _add_routes(app, Judge(pool))
    return app


def _add_routes(app: FastAPI, judge: Judge) -> None:
    @app.post("/v1/grade", responses=_ERRORS, tags=["grade"])
    async def grade(request: GradeRequest) -> GradeResult:
        """Grade one response."""
        return GradeResult.of((await judge.judge([_question(request)]))[0], request.id)

    @app.post("/v1/grade/batch", responses=_ERRORS, tags=["grade"])
    async def grade_batch(request: BatchRequest) -> BatchResult:
        """Grade many; the results come in the order of the items, and a slow one costs no other its verdict."""
        judgements = await judge.judge([_question(item) for item in request.items])
        pairs = zip(judgements, request.items, strict=True)
        return BatchResult(results=[GradeResult.of(judgement, item.id) for judgement, item in pairs])

    @app.post("/get_reward", responses=_ERRORS, tags=["trainers"], response_model=None)
    async def get_reward(
        request: Annotated[OpenRlhfRequest | SlimeRequest, Body()],
        extraction: Extraction = Extraction.AUTO,
        bare: bool = False,  # noqa: FBT001, FBT002 - a query parameter
    ) -> OpenRlhfResult | SlimeResult | float:
        """Reward as OpenRLHF (query, prompts, labels) or slime (prompt, response, label) ask for it.

        `?bare=true` answers slime's form with the number alone.
        """
        if isinstance(request, OpenRlhfRequest):
            return await _open_rlhf(judge, request, extraction)
        [judgement] = await judge.judge(
            [Question(_SPECIAL_TOKEN.sub("", request.response), golds_of(request.label), extraction)]
        )
        score = float(judgement.is_correct)
        return score if bare else SlimeResult(score=score, verdict=judgement.verdict, extracted=judgement.extracted)


async def _open_rlhf(judge: Judge, request: OpenRlhfRequest, extraction: Extraction) -> OpenRlhfResult:
    prompts = request.prompts or [""] * len(request.query)
    if not len(request.query) == len(prompts) == len(request.labels):
        raise HTTPException(
            422, f"query, prompts, labels have {len(request.query)}, {len(prompts)}, {len(request.labels)} entries"
        )
    judgements = await judge.judge(
        [
            Question(_response(query, prompt), golds_of(label), extraction)
            for query, prompt, label in zip(request.query, prompts, request.labels, strict=True)
        ]
    )
    rewards = [float(judgement.is_correct) for judgement in judgements]
    logs = {
        verdict: [float(judgement.verdict == verdict) for judgement in judgements]
        for verdict in ("no_answer", "timeout", "unparsable_gold")
    }
    return OpenRlhfResult(rewards=rewards, scores=rewards, extra_logs=logs if rewards else {})


def _question(request: GradeRequest) -> Question:
    golds = (request.gold,) if isinstance(request.gold, str) else tuple(request.gold)
    return Question(request.response, golds, request.extraction)


def _response(query: str, prompt: str) -> str:
    r"""Take the prompt off: it often holds a `\boxed{}` of its own, and a BOS token may stand before it."""
    query, prompt = _SPECIAL_TOKEN.sub("", query), _SPECIAL_TOKEN.sub("", prompt).strip()
    before, found, after = query.partition(prompt) if prompt else ("", "", query)
    return after if found or not prompt else before


class _BodyLimit:
    """Refuse bodies over MAX_BODY_BYTES before they are in memory: Starlette reads all of one first."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
            await _problem(413, f"the body may have {MAX_BODY_BYTES} bytes")(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY_BYTES:
                raise HTTPException(413, f"the body may have {MAX_BODY_BYTES} bytes")
            return message

        await self._app(scope, counted, send)


def _problem(status: int, detail: str, *, headers: dict[str, str] | None = None, **extra: Any) -> Response:
    body = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail, **extra}
    # json.dumps escapes everything beyond ASCII: what is wrong with a request may be its encoding.
    return Response(json.dumps(body), status, headers, media_type="application/problem+json")


async def _malformed(_: Request, error: Exception) -> Response:
    errors = [
        {"where": ".".join(str(part) for part in entry["loc"]), "message": entry["msg"]}
        for entry in cast(RequestValidationError, error).errors()[:20]
    ]
    detail = f"{errors[0]['where']}: {errors[0]['message']}" if errors else "the request is malformed"
    return _problem(422, detail, errors=errors)


async def _http_error(_: Request, error: Exception) -> Response:
    error = cast(HTTPException, error)
    return _problem(error.status_code, str(error.detail), headers=dict(error.headers or {}))


async def _busy(_: Request, error: Exception) -> Response:
    return _problem(503, str(error), headers={"Retry-After": str(RETRY_AFTER_S)})


async def _internal(_: Request, error: Exception) -> Response:
    return _problem(500, f"the grader failed ({type(error).__name__}); its log says where")
