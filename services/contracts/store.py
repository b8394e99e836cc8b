"""Connections to Redis or Valkey: every wait has a deadline, and a restarted server is waited for.

What is kept there is the business of `ledger` and `registry`.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import (
    AuthenticationError,
    ConnectionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,
)

from services.contracts.config import ConfigError

SOCKET_TIMEOUT_S = 5.0  # no command of ours blocks on the server
CONNECT_TIMEOUT_S = 2.0
PATIENCE_S = 30.0  # how long a running service waits for a server that went away: a restart with its file to read
START_PATIENCE_S = 5.0  # at start, the server may still be coming up beside us
MAX_CONNECTIONS = 16  # further commands queue for one
SECRET_PARAMETERS = frozenset({"password", "ssl_password"})

# Answers of a server that will be well again: its disk is full, its memory is, or it is not the primary for now.
# A script that is refused so has done nothing: the server looks before the first write.
_PASSING = ("MISCONF", "NOREPLICAS")
# Those that last until somebody makes room. To end would mend nothing, and a run shall pause when a disk is full.
_FULL = "MISCONF"

log = logging.getLogger(__name__)
_T = TypeVar("_T")


_refusals: list[str] = []  # why, of each command that waits for room now


def refusal() -> str | None:
    """Why commands of this process wait: Redis has no room left. None when none does."""
    return _refusals[-1] if _refusals else None


class _Patience:
    """How long one command is tried again."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s, self._deadline = patience_s, time.monotonic() + patience_s
        self._refusal: str | None = None

    def allows(self, pause_s: float, error: Exception) -> bool:
        """Whether to try again in `pause_s`, after this error."""
        if is_full(error) and self._refusal is None:
            self._refusal = f"paused: Redis has no room left and refuses to write ({error}); free some disk or memory"
            _refusals.append(self._refusal)
            log.warning("Redis has no room left and refuses to write; waiting", extra={"error": str(error)})
        if is_full(error):
            self._deadline = time.monotonic() + self._patience_s
        return is_full(error) or time.monotonic() + pause_s <= self._deadline

    def end(self) -> None:
        """It is tried no more."""
        if self._refusal is not None:
            _refusals.remove(self._refusal)


class PatientRetry(Retry):
    """Retry with exponential back-off (50 ms to 1 s) until `patience_s` has passed since the command was first tried.

    A server whose disk or memory is full is waited for without end (`refusal` says so meanwhile): it answers.

    redis-py counts attempts, and nests one such loop (connecting) inside another (sending): N becomes N^2. A clock
    bounds both. A command may therefore run twice when its reply was lost, so all of ours are safe to repeat.

    It also mends lost cancellations: redis-py sends under `asyncio.wait_for`, which in Python 3.11 forgets a
    cancellation that arrives in the moment the sending ends. A service would then never stop.
    """

    def __init__(self, patience_s: float) -> None:
        supported = (ConnectionError, TimeoutError, ResponseError)
        super().__init__(ExponentialBackoff(cap=1.0, base=0.05), retries=-1, supported_errors=supported)
        self._patience_s = patience_s

    async def call_with_retry(
        self,
        do: Callable[[], Awaitable[_T]],
        fail: Callable[..., Any],
        is_retryable: Callable[[Exception], bool] | None = None,
        with_failure_count: bool = False,  # noqa: FBT001, FBT002 (redis-py's signature)
    ) -> _T:
        """Await `do()`; on a lost connection or a timeout call `fail` (which disconnects) and try again."""
        patience, cancellations = _Patience(self._patience_s), _cancellations()
        failures = 0
        try:
            while True:
                try:
                    result = await do()
                    if _cancellations() > cancellations:
                        raise asyncio.CancelledError
                    return result
                except self._supported_errors as error:
                    if _is_lasting(error):
                        if _cancellations() > cancellations:
                            raise asyncio.CancelledError from error
                        raise
                    if is_retryable and not is_retryable(error):
                        raise
                    failures += 1
                    await (fail(error, failures) if with_failure_count else fail(error))
                    pause_s = self._backoff.compute(failures)
                    if _cancellations() > cancellations:
                        raise asyncio.CancelledError from error
                    if not patience.allows(pause_s, error):
                        raise
                    await asyncio.sleep(pause_s)
        finally:
            patience.end()


class _Pool(BlockingConnectionPool):
    """Mends the same lost cancellations while a new connection introduces itself, which no `Retry` surrounds."""

    async def get_connection(self, *args: Any, **options: Any) -> Any:
        """A connection that is ready. While commands that Redis has no room for hold them all, it is waited for."""
        cancellations = _cancellations()
        while True:
            try:
                connection = await super().get_connection(*args, **options)  # type: ignore[no-untyped-call]
                break
            except ConnectionError:
                if refusal() is None:
                    raise
        if _cancellations() > cancellations:
            await self.release(connection)
            raise asyncio.CancelledError
        return connection


async def connect(url: str, *, patience_s: float = PATIENCE_S, start_patience_s: float = START_PATIENCE_S) -> Redis:
    """Open a client and check that a server answers.

    url: `redis://[:password@]host:port/db`, or `unix://`, or `rediss://` for TLS, where the certificate of an authority
    of one's own is named by `?ssl_ca_certs=/path/ca.pem` and a client's by `ssl_certfile`, `ssl_keyfile`.
    patience_s: how long each later command waits for a lost server, or one that refuses to write for now, before it
    raises redis.exceptions.RedisError. Replies are bytes.
    Raises ConfigError, one line, when no server answers within `start_patience_s`. Close with `await client.aclose()`.
    """
    try:
        client = _client(url, start_patience_s)
    except ValueError as error:
        raise ConfigError(f"redis.url {masked(url)!r}: {error}") from error
    try:
        await client.ping()
    except AuthenticationError as error:
        raise ConfigError(f"redis.url {masked(url)!r}: the server refuses the name or password ({error})") from error
    except RedisError as error:
        raise ConfigError(f"no Redis at {masked(url)}: {error}") from error
    except (TypeError, OSError) as error:  # a parameter that the client does not know; a certificate that is not there
        raise ConfigError(f"redis.url {masked(url)!r}: {error}") from error
    finally:
        await client.aclose()
    return _client(url, patience_s)


def _cancellations() -> int:
    """How often the running task was asked to stop."""
    task = asyncio.current_task()
    return task.cancelling() if task else 0


def _client(url: str, patience_s: float) -> Redis:
    pool = _Pool.from_url(
        url,
        timeout=PATIENCE_S,
        max_connections=MAX_CONNECTIONS,
        socket_timeout=SOCKET_TIMEOUT_S,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        socket_keepalive=True,
        protocol=2,  # the same reply shapes from every redis-py and server version
        retry=PatientRetry(patience_s),
    )
    return Redis.from_pool(pool)


def _is_lasting(error: Exception) -> bool:
    """Whether waiting does not mend it. A wrong password is a ConnectionError to redis-py."""
    return isinstance(error, AuthenticationError) or (isinstance(error, ResponseError) and not is_passing(error))


def is_passing(error: ResponseError) -> bool:
    """Whether the same command is worth another try."""
    return isinstance(error, OutOfMemoryError | ReadOnlyError) or str(error).startswith(_PASSING)


def is_full(error: Exception) -> bool:
    """Whether the server lacks disk or memory."""
    return isinstance(error, OutOfMemoryError) or (isinstance(error, ResponseError) and str(error).startswith(_FULL))


def masked(url: str) -> str:
    """The URL without its passwords, for logs, messages and the terminal."""
    parts = urlsplit(url)
    if parts.password is not None:
        parts = parts._replace(netloc=f"{parts.username or ''}:***@{parts.netloc.rpartition('@')[2]}")
    parameters = parse_qsl(parts.query, keep_blank_values=True)
    if any(name in SECRET_PARAMETERS for name, _ in parameters):
        shown = [(name, "***" if name in SECRET_PARAMETERS else value) for name, value in parameters]
        parts = parts._replace(query=urlencode(shown, safe="*/"))
    return parts.geturl()
