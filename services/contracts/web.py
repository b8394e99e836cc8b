"""What the HTTP services do alike: errors as problem+json (RFC 9457), bearer tokens compared, a limit on bodies,
what browsers may do.

Imported by services that have FastAPI; nothing else of `contracts` imports this.
"""

import hmac
import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Literal, cast

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MEDIA_TYPE = "application/problem+json"
MAX_FIELD_ERRORS = 20
LOCKED_DOWN = "default-src 'none'; frame-ancestors 'none'"  # Content-Security-Policy of what is no page


class FieldError(BaseModel):
    """What is wrong with one field."""

    where: str
    message: str


class Problem(BaseModel):
    """Any answer that is not a 2xx."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    type: Literal["about:blank"]
    title: str
    """The status in words."""
    status: int
    detail: str
    """What was wanted and what came."""
    errors: list[FieldError] | None = None
    """422: the first faults found."""


def problem_body(status: int, detail: str, **extra: Any) -> dict[str, Any]:
    """A problem as plain values."""
    title = HTTPStatus(status).phrase if status in set(HTTPStatus) else detail
    return {"type": "about:blank", "title": title, "status": status, "detail": detail, **extra}


def problem(status: int, detail: str, *, headers: Mapping[str, str] | None = None, **extra: Any) -> Response:
    """The answer itself, in ASCII: what is wrong with a request may be its encoding."""
    return Response(json.dumps(problem_body(status, detail, **extra)), status, headers, media_type=MEDIA_TYPE)


def add_problems(app: FastAPI, *, failed: str) -> None:
    """Let every error of `app` be a problem, and the OpenAPI document say so. failed: who, when a bug answers 500."""

    async def internal(_: Request, error: Exception) -> Response:
        return problem(500, f"{failed} failed ({type(error).__name__}); its log says where")

    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, internal)
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()  # FastAPI makes it once and keeps it
        for path in document["paths"].values():
            for operation in path.values():
                for status, response in operation["responses"].items():
                    content = response.get("content", {})
                    if int(status) >= 400 and "application/json" in content:
                        content[MEDIA_TYPE] = content.pop("application/json")
        return document

    app.openapi = openapi  # type: ignore[method-assign]


async def _malformed(request: Request, error: Exception) -> Response:
    media_type = request.headers.get("content-type", "")
    found = cast(RequestValidationError, error).errors()
    if any(entry["loc"][:1] == ("body",) for entry in found) and not _is_json(media_type):
        return problem(415, f"Content-Type must be application/json, got {media_type!r}")
    errors = [
        {"where": ".".join(str(part) for part in entry["loc"]), "message": entry["msg"]}
        for entry in found[:MAX_FIELD_ERRORS]
    ]
    detail = f"{errors[0]['where']}: {errors[0]['message']}" if errors else "the request is malformed"
    return problem(422, detail, errors=errors)


def _is_json(media_type: str) -> bool:
    essence = media_type.partition(";")[0].strip().lower()
    return essence == "application/json" or (essence.startswith("application/") and essence.endswith("+json"))


async def _http_error(_: Request, error: Exception) -> Response:
    error = cast(HTTPException, error)
    return problem(error.status_code, str(error.detail), headers=error.headers)


def is_bearer(authorization: bytes, token: str) -> bool:
    """Whether the header is `Bearer TOKEN`; takes as long for any token that is wrong."""
    scheme, _, given = authorization.partition(b" ")
    return hmac.compare_digest(given.strip(), token.encode()) and scheme.lower() == b"bearer"


class BodyLimit:
    """Refuse bodies over `max_bytes` before they are in memory: Starlette reads all of one first."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 413, at once where the length is declared and else once too much has come, or pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        too_large = f"the body may have {self._max_bytes} bytes"
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared[:20]) > self._max_bytes:
            await problem(413, too_large)(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise HTTPException(413, too_large)
            return message

        await self._app(scope, counted, send)


class SecurityHeaders:
    """Browsers: no sniffing, no referrer, and by path what a page may load; LOCKED_DOWN elsewhere."""

    def __init__(self, app: ASGIApp, *, policies: Mapping[str, str]) -> None:
        self._app = app
        self._policies = policies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Add the headers to the response."""

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
                headers["Content-Security-Policy"] = self._policies.get(scope["path"], LOCKED_DOWN)
            await send(message)

        await self._app(scope, receive, with_headers)
