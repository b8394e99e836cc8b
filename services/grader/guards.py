"""What stands before every route, as ASGI middleware: the bearer token."""

from starlette.types import ASGIApp, Receive, Scope, Send

from services.contracts.web import is_bearer, problem


class Bearer:
    """Refuse a POST without `Authorization: Bearer KEY`, before its body is read. Health, metrics, pages stay open."""

    def __init__(self, app: ASGIApp, *, api_key: str) -> None:
        self._app = app
        self._api_key = api_key

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
        return is_bearer(dict(scope["headers"]).get(b"authorization", b""), self._api_key)
