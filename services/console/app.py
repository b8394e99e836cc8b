"""The console's FastAPI application: the page at `/`, its files, and under `/api` what the page asks for. GET only.

What a model wrote reaches the browser as JSON strings, and the page makes text nodes of them, never HTML; the
Content-Security-Policy allows scripts of this host alone, and none inline.
"""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from fastapi import APIRouter, FastAPI, HTTPException, Query, Response
from fastapi.staticfiles import StaticFiles
from prometheus_client import Counter

from services.console.source import Source
from services.contracts.samples import SampleError
from services.contracts.telemetry import add_health
from services.contracts.web import SecurityHeaders, add_problems

STATIC = Path(__file__).with_name("static")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
REQUESTS = Counter("multiattempt_console_requests_total", "Requests of pages for data", ["route"])

Outcome = Literal["", "first", "later", "incorrect", "no_answer", "timeout", "length"]

log = logging.getLogger(__name__)
_encoder = msgspec.json.Encoder()


def create_app(source: Source) -> FastAPI:
    """All routes. source: of the one run that is shown."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await source.close()

    app = FastAPI(title="Training console", version="1", lifespan=lifespan, docs_url=None, redoc_url=None)
    add_problems(app, failed="the console")
    app.add_middleware(SecurityHeaders, policies={"/": POLICY})
    add_health(app, ready=lambda: None)
    page = (STATIC / "index.html").read_bytes()

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return Response(page, media_type="text/html", headers={"Cache-Control": "no-cache"})

    app.include_router(_routes(source))
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    return app


def _routes(source: Source) -> APIRouter:
    router = APIRouter(prefix="/api")

    @router.get("/run")
    async def run() -> Response:
        """Name, length and settings of the run."""
        return _answer("run", source.run())

    @router.get("/live")
    async def live() -> Response:
        """Replicas, ledger, vital signs and the last warnings, now."""
        return _answer("live", await source.live())

    @router.get("/steps")
    async def steps(
        after: Annotated[int, Query(ge=0)] = 0, generation: Annotated[str, Query(max_length=40)] = ""
    ) -> Response:
        """Figures of the steps after `after`; all of them for another `generation` than the current one."""
        return _answer("steps", await source.steps(after=after, generation=generation))

    @router.get("/dialogues")
    def dialogues(
        step: Annotated[int | None, Query(ge=0)] = None,
        outcome: Outcome = "",
        text: Annotated[str, Query(max_length=200)] = "",
    ) -> Response:
        """The newest dialogues that were kept and fit."""
        try:
            return _answer("dialogues", source.dialogues(step=step, outcome=outcome, text=text))
        except (SampleError, OSError) as error:
            raise HTTPException(500, str(error)) from error

    @router.get("/dialogues/{step}/{task_id}")
    def dialogue(step: int, task_id: int) -> Response:
        """One dialogue in full."""
        try:
            found = source.dialogue(step, task_id)
        except (SampleError, OSError) as error:
            raise HTTPException(500, str(error)) from error
        if found is None:
            raise HTTPException(404, f"no dialogue of task {task_id} in step {step}: it was thinned out, or never kept")
        return _answer("dialogue", found)

    return router


def _answer(route: str, value: object) -> Response:
    REQUESTS.labels(route).inc()
    return Response(_encoder.encode(value), media_type="application/json", headers={"Cache-Control": "no-store"})
