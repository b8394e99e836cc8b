"""Who may use the control routes: whoever has the token; with no token configured, programs on this machine."""

import ipaddress
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from fastapi import HTTPException, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from services.contracts.web import Problem, is_bearer

WHERE = "rollout.control_token (MULTIATTEMPT_ROLLOUT__CONTROL_TOKEN)"
REFUSALS: dict[int | str, dict[str, Any]] = {
    401: {"model": Problem, "description": "The bearer token is missing or wrong"},
    403: {"model": Problem, "description": "No token is configured, and the caller is not on this machine"},
}
FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip")

_scheme = HTTPBearer(auto_error=False, description=f"The run's {WHERE}")


def controller_only(token: str) -> Callable[..., None]:
    """A dependency that lets a controller pass: 401 without the right token; with no token to have, 403 from afar."""

    def check(request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Security(_scheme)]) -> None:
        if token:
            if not is_bearer(request.headers.get("authorization", "").encode("latin-1"), token):
                raise HTTPException(
                    401, f"control needs the bearer token {WHERE}", headers={"WWW-Authenticate": "Bearer"}
                )
        elif not is_local(request.client.host if request.client else "", request.headers):
            raise HTTPException(
                403, f"without a token control answers only to programs on this machine; set {WHERE} on both sides"
            )

    return check


def is_local(peer: str, headers: Mapping[str, str]) -> bool:
    """Whether a program on this machine asks: not a proxy for another, not a web page in a browser that runs here."""
    try:
        address = ipaddress.ip_address(peer)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    is_relayed = any(name in headers for name in (*FORWARDED, "origin"))
    return (mapped or address).is_loopback and not is_relayed
