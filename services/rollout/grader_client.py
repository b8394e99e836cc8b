"""The grader over HTTP. A grader that is down or busy is waited for; what it never becomes is a verdict."""

import asyncio
import time
from dataclasses import dataclass
from typing import Protocol

import httpx

from services.contracts.wire import Verdict

FIRST_PAUSE_S, LAST_PAUSE_S = 0.05, 2.0
REQUEST_TIMEOUT_S = 15.0  # of one try; the grader bounds its own work well below
MAX_CONNECTIONS = 256


class GraderUnavailable(RuntimeError):
    """No answer within the deadline. The dialogue has no verdict; its task must be tried again."""


@dataclass(frozen=True, slots=True)
class Grade:
    """The grader's word on one attempt."""

    verdict: Verdict
    extracted: str | None
    elapsed_ms: float


class Grader(Protocol):
    """What a dialogue needs of a grader."""

    async def grade(self, response: str, gold: tuple[str, ...]) -> Grade:
        """Judge the last box of `response`. Raises GraderUnavailable."""


class HttpGrader:
    """`POST /v1/grade`, with back-off on lost connections, 5xx and 429, until `timeout_s` has passed."""

    def __init__(self, url: str, *, timeout_s: float, transport: httpx.AsyncBaseTransport | None = None) -> None:
        limits = httpx.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=MAX_CONNECTIONS)
        self._client = httpx.AsyncClient(base_url=url, timeout=REQUEST_TIMEOUT_S, limits=limits, transport=transport)
        self._timeout_s = timeout_s

    async def grade(self, response: str, gold: tuple[str, ...]) -> Grade:
        """See Grader. A 4xx is a bug on this side and raises httpx.HTTPStatusError."""
        deadline, pause_s = time.monotonic() + self._timeout_s, FIRST_PAUSE_S
        body = {"response": response, "gold": list(gold), "extraction": "boxed"}
        while True:
            try:
                patience_s = max(0.0, min(REQUEST_TIMEOUT_S, deadline - time.monotonic()))
                answer = await self._client.post("/v1/grade", json=body, timeout=patience_s)
                if not (answer.is_server_error or answer.status_code == httpx.codes.TOO_MANY_REQUESTS):
                    fields = answer.raise_for_status().json()
                    return Grade(Verdict(fields["verdict"]), fields["extracted"], fields["elapsed_ms"])
                reason = f"{answer.status_code}"
            except httpx.TransportError as error:
                reason = repr(error)
            if time.monotonic() + pause_s > deadline:
                raise GraderUnavailable(f"no verdict within {self._timeout_s:g} s, last: {reason}")
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LAST_PAUSE_S)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()
