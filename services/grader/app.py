"""The FastAPI application: `POST /v1/grade`, `/v1/grade/batch`, `/v1/explain`, the trainers' routes, health, the pages.

Errors are problem+json (RFC 9457). An item that cannot be graded is a 200 with its verdict; 4xx is for malformed
requests, 503 with Retry-After for a full queue. Grading itself is `judge`'s.
"""

import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Header, Security
from fastapi.responses import HTMLResponse
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline

from services.contracts.settings import GraderSection
from services.contracts.telemetry import add_health
from services.contracts.tracing import HEADER, Attribute, record_parts
from services.contracts.web import BodyLimit, SecurityHeaders
from services.contracts.wire import Verdict
from services.grader.guards import Bearer
from services.grader.judge import Judge, Judgement, Question
from services.grader.page import DOCS_POLICY, PAGE, PAGE_POLICY
from services.grader.pool import Pool
from services.grader.problems import MAX_BODY_BYTES, RESPONSES, UNAUTHORIZED, add_problems
from services.grader.protocol import BatchRequest, BatchResult, ExplainResult, GradeRequest, GradeResult
from services.grader.trainers import trainer_routes

LOGGED_ID_CHARS = 64

log = logging.getLogger(__name__)

Traces = Annotated[str, Header(alias=HEADER, include_in_schema=False)]

_DESCRIPTION = """Is this final answer mathematically equal to the gold answer?

An answer that cannot be graded is a 200 whose `verdict` says why. Errors are
[problem+json](https://www.rfc-editor.org/rfc/rfc9457): 4xx for a malformed request, 503 with `Retry-After` for a full
queue. Of a key that comes twice in an object, the last counts. [Try it by hand](/)."""


def create_app(config: GraderSection, *, api_key: str | None = None) -> FastAPI:
    """Build the application; its worker processes live from start-up to shut-down.

    With `api_key`, every POST must carry it as a bearer token.
    """
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

    app = FastAPIOffline(
        title="Math grader",
        version="1",
        description=_DESCRIPTION,
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.pool = pool
    add_problems(app)
    app.add_middleware(BodyLimit, max_bytes=MAX_BODY_BYTES)
    protection: dict[str, Any] = {}
    if api_key:
        app.add_middleware(Bearer, api_key=api_key)
        scheme = HTTPBearer(
            auto_error=False, description="The grader's GRADER_API_KEY"
        )  # for the document: Bearer checks
        protection = {"dependencies": [Security(scheme)], "responses": UNAUTHORIZED}
    app.add_middleware(SecurityHeaders, policies={"/": PAGE_POLICY, "/docs": DOCS_POLICY})
    judge = Judge(pool, cache_items=config.cache_items)
    app.include_router(_native_routes(judge, **protection))
    app.include_router(trainer_routes(judge, config, **protection))
    add_health(app, pool.not_ready)

    @app.get("/health", tags=["health"])
    async def health() -> dict[str, str]:
        """Whether the process answers, as PipelineRL asks it."""
        return {"status": "ok"}

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(PAGE)

    return app


def _native_routes(judge: Judge, **options: Any) -> APIRouter:
    router = APIRouter(tags=["grade"], **options)

    @router.post("/v1/grade", responses=RESPONSES)
    async def grade(request: GradeRequest, traces: Traces = "") -> GradeResult:
        """Grade one response."""
        [judgement] = await _judged(judge, [request], traces)
        return GradeResult.of(judgement, request.id)

    @router.post("/v1/explain", responses=RESPONSES)
    async def explain(request: GradeRequest) -> ExplainResult:
        """Grade one response, and show both sides as mathematics and as they are compared: what the page at / asks."""
        judgement, explanation = await judge.explain(_question(request))
        return ExplainResult.model_validate(GradeResult.of(judgement, request.id).model_dump() | asdict(explanation))

    @router.post("/v1/grade/batch", responses=RESPONSES)
    async def grade_batch(request: BatchRequest, traces: Traces = "") -> BatchResult:
        """Grade many; the results come in the order of the items, and a slow one costs no other its verdict."""
        judgements = await _judged(judge, request.items, traces)
        pairs = zip(judgements, request.items, strict=True)
        return BatchResult(results=[GradeResult.of(judgement, item.id) for judgement, item in pairs])

    return router


async def _judged(judge: Judge, requests: Sequence[GradeRequest], traces: str) -> list[Judgement]:
    """Judge them; whoever asked may want it in their traces (`tracing.HEADER`), and finds his `id` in the log."""
    start_s = time.time()
    judgements = await judge.judge([_question(request) for request in requests])
    for request, judgement in zip(requests, judgements, strict=True):
        if judgement.verdict is Verdict.TIMEOUT:
            told = {"id": (request.id or "")[:LOGGED_ID_CHARS], "elapsed_ms": round(judgement.elapsed_ms)}
            log.warning("not compared in time", extra=told)
    if traces:
        record_parts(traces, "grader", start_s, [_told(judgement) for judgement in judgements])
    return judgements


def _told(judgement: Judgement) -> dict[str, Attribute]:
    told: dict[str, Attribute] = {"verdict": judgement.verdict.value, "method": judgement.method or "none"}
    return told | {"elapsed_ms": judgement.elapsed_ms, "cached": judgement.is_cached}


def _question(request: GradeRequest) -> Question:
    golds = (request.gold,) if isinstance(request.gold, str) else tuple(request.gold)
    return Question(request.response, golds, request.extraction)
