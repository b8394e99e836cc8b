"""The grader's own errors as problem+json: which statuses its routes answer with, and its pool's refusals."""

from typing import Any

from fastapi import FastAPI, Request, Response

from services.contracts.web import Problem, problem
from services.contracts.web import add_problems as add_common_problems
from services.grader.pool import BatchTooLargeError, PoolBusyError

MAX_BODY_BYTES = 32 * 2**20
RETRY_AFTER_S = 1

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


def add_problems(app: FastAPI) -> None:
    """Let every error of `app` be a problem, and the OpenAPI document say so."""
    add_common_problems(app, failed="the grader")
    app.add_exception_handler(PoolBusyError, _busy)
    app.add_exception_handler(BatchTooLargeError, _too_large)


async def _too_large(_: Request, error: Exception) -> Response:
    return problem(413, str(error))


async def _busy(_: Request, error: Exception) -> Response:
    return problem(503, str(error), headers={"Retry-After": str(RETRY_AFTER_S)})
