"""What stands before every route, as ASGI middleware: the bearer token, the limit on bodies, security headers."""

import hmac
from collections.abc import Mapping

from fastapi import HTTPException
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.grader.problems import MAX_BODY_BYTES, problem

LOCKED_DOWN = "default-src 'none'; frame-ancestors 'none'"  # Content-Security-Policy of what is no page


class Bearer:
    """Refuse a POST without `Authorization: Bearer KEY`, before its body is read. Health, metrics, pages stay open."""

    def __init__(self, app: ASGIApp, *, api_key: str) -> None:
        self._app = app
        self._api_key = api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401, or pass the request on."""
        if scope["type"] == "http" and scope["method"] == "POST" and not self._is_authorized(scope):
            refusal = problem(
                401,
                "a bearer token is wanted: `Authorization: Bearer ...` with the grader's GRADER_API_KEY",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await refusal(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_authorized(self, scope: Scope) -> bool:
        scheme, _, token = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        return hmac.compare_digest(token.strip(), self._api_key) and scheme.lower() == b"bearer"


class BodyLimit:
    """Refuse bodies over MAX_BODY_BYTES before they are in memory: Starlette reads all of one first."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 413, at once where the length is declared and else once too much has come, or pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        too_large = f"the body may have {MAX_BODY_BYTES} bytes"
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared[:20]) > MAX_BODY_BYTES:
            await problem(413, too_large)(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY_BYTES:
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
