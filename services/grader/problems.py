"""Errors as problem+json (RFC 9457): the body, which statuses there are, and what turns an exception into one."""

import json
from http import HTTPStatus
from typing import Any, Literal, cast

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException

from services.grader.pool import BatchTooLargeError, PoolBusyError

MAX_BODY_BYTES = 32 * 2**20
MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 1
MAX_FIELD_ERRORS = 20


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


RESPONSES: dict[int | str, dict[str, Any]] = {
    400: {
        "model": Problem,
        "description": "The body is not UTF-8, is nested too deeply, or holds a number that is too long",
    },
    413: {"model": Problem, "description": f"The body has more than {MAX_BODY_BYTES} bytes"},
    415: {"model": Problem, "description": "Content-Type is not application/json"},
    422: {"model": Problem, "description": "The body is not JSON, or a field is missing, of a wrong type or too long"},
    503: {"model": Problem, "description": "The queue is full; try again after Retry-After seconds"},
}
UNAUTHORIZED: dict[int | str, dict[str, Any]] = {
    401: {"model": Problem, "description": "The bearer token is missing or wrong"}
}


def problem(status: int, detail: str, *, headers: dict[str, str] | None = None, **extra: Any) -> Response:
    """The answer itself, in ASCII: what is wrong with a request may be its encoding."""
    body = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail, **extra}
    return Response(json.dumps(body), status, headers, media_type=MEDIA_TYPE)


def add_problems(app: FastAPI) -> None:
    """Let every error of `app` be a problem, and the OpenAPI document say so."""
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(PoolBusyError, _busy)
    app.add_exception_handler(BatchTooLargeError, _too_large)
    app.add_exception_handler(Exception, _internal)
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
    if not _is_json(media_type):
        return problem(415, f"Content-Type must be application/json, got {media_type!r}")
    errors = [
        {"where": ".".join(str(part) for part in entry["loc"]), "message": entry["msg"]}
        for entry in cast(RequestValidationError, error).errors()[:MAX_FIELD_ERRORS]
    ]
    detail = f"{errors[0]['where']}: {errors[0]['message']}" if errors else "the request is malformed"
    return problem(422, detail, errors=errors)


def _is_json(media_type: str) -> bool:
    essence = media_type.partition(";")[0].strip().lower()
    return essence == "application/json" or (essence.startswith("application/") and essence.endswith("+json"))


async def _http_error(_: Request, error: Exception) -> Response:
    error = cast(HTTPException, error)
    return problem(error.status_code, str(error.detail), headers=dict(error.headers or {}))


async def _too_large(_: Request, error: Exception) -> Response:
    return problem(413, str(error))


async def _busy(_: Request, error: Exception) -> Response:
    return problem(503, str(error), headers={"Retry-After": str(RETRY_AFTER_S)})


async def _internal(_: Request, error: Exception) -> Response:
    return problem(500, f"the grader failed ({type(error).__name__}); its log says where")
