"""JSON logs, health endpoints and Prometheus metrics, the same in every service.

    configure_logging("rollout", run="demo")                     once, in __main__
    log = logging.getLogger(__name__)
    log.info("dialogue finished", extra={"task_id": 7})          extra fields become JSON keys
    label_logs(replica="rollout-0", version=lambda: v)           on every line of this process from now on
    with about(task_id=7):                                       on every line from inside
    add_health(app, ready=lambda: None)                          FastAPI: /healthz /readyz /metrics
    server = serve_health(ready, host="127.0.0.1", port=0)       the same three routes without FastAPI

Metrics themselves are plain `prometheus_client` objects, declared in the module that counts; names begin with
`multiattempt_`. What ready means is each service's own business: `ready()` returns None, or the reason why not.
"""

import contextlib
import logging
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest

if TYPE_CHECKING:
    from fastapi import FastAPI

Ready = Callable[[], str | None]

HEALTH_PATHS = ("/healthz", "/readyz", "/metrics")
REQUEST_TIMEOUT_S = 10.0  # a client that connects and says nothing is dropped

# Attributes that every LogRecord has: whatever else it carries came in through `extra`.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}

_json = msgspec.json.Encoder(enc_hook=str)  # NaN becomes null, so that every line is valid JSON


_labels: dict[str, object] = {}  # of this process
_about: ContextVar[Mapping[str, object]] = ContextVar("about", default=MappingProxyType({}))


def label_logs(**fields: object) -> None:
    """Have every line of this process carry these fields; one that can be called is, for each line."""
    _labels.update(fields)


@contextlib.contextmanager
def about(**fields: object) -> Iterator[None]:
    """Have every line from inside carry these fields, from tasks and threads begun there too."""
    token = _about.set({**_about.get(), **fields})
    try:
        yield
    finally:
        _about.reset(token)


def what_about(field: str) -> object:
    """The field of the `about` that this is inside of; None without one."""
    return _about.get().get(field)


class Context(logging.Filter):
    """Gives a record what `about` and `label_logs` say, unless it says so itself. Lets every record pass."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the fields that are missing."""
        labels = {name: value() if callable(value) else value for name, value in _labels.items()}
        for name, value in (labels | dict(_about.get())).items():
            record.__dict__.setdefault(name, value)
        return True


class JsonFormatter(logging.Formatter):
    """One log record as one line of JSON: ts (UTC), level, service, run, logger, msg, extra fields, exception."""

    def __init__(self, *, service: str, run: str) -> None:
        super().__init__()
        self._base = {"service": service, "run": run}

    def format(self, record: logging.LogRecord) -> str:
        """Encode the record; an extra field may not replace a standard one."""
        line: dict[str, object] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            **self._base,
            "logger": record.name,
            "msg": record.getMessage(),
        }
        line |= {key: value for key, value in vars(record).items() if key not in _STANDARD and key not in line}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _json.encode(line).decode()


def configure_logging(service: str, *, run: str, level: str = "INFO", stream: TextIO | None = None) -> None:
    """Send every log record of this process to `stream` (stderr) as JSON lines; Python warnings too.

    Replaces the root logger's handlers, forgets labels. Start uvicorn with `log_config=None`, or it installs its own.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(service=service, run=run))
    handler.addFilter(Context())
    _labels.clear()
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.captureWarnings(capture=True)
    for chatty in ("httpx", "httpcore", "uvicorn.access"):  # a line for each request says nothing here
        logging.getLogger(chatty).setLevel(logging.WARNING)


class HealthReply(NamedTuple):
    """What a health route answers, whichever HTTP server carries it."""

    status: int
    media_type: str
    body: bytes


def health_reply(path: str, ready: Ready, *, registry: CollectorRegistry = REGISTRY) -> HealthReply | None:
    """Answer one of HEALTH_PATHS; None for any other path. Not ready is 503 with the reason, as problem+json."""
    if path == "/healthz":
        return HealthReply(200, "application/json", b'{"status":"alive"}')
    if path == "/metrics":
        return HealthReply(200, CONTENT_TYPE_LATEST, generate_latest(registry))
    if path != "/readyz":
        return None
    reason = ready()
    if reason is None:
        return HealthReply(200, "application/json", b'{"status":"ready"}')
    problem = {"type": "about:blank", "title": "Not ready", "status": 503, "detail": reason}
    return HealthReply(503, "application/problem+json", _json.encode(problem))


def add_health(app: "FastAPI", ready: Ready, *, registry: CollectorRegistry = REGISTRY) -> None:
    """Give a FastAPI app /healthz (the process answers), /readyz (it can do its work) and /metrics."""
    from fastapi import Response  # not installed with the learner

    def route(path: str) -> Callable[[], Awaitable[Response]]:
        async def answer() -> Response:  # on the event loop, so `ready` may look at the loop's state
            reply = health_reply(path, ready, registry=registry)
            assert reply is not None
            return Response(reply.body, status_code=reply.status, headers={"content-type": reply.media_type})

        return answer

    answers: dict[str, dict[int | str, dict[str, Any]]] = {  # for the OpenAPI document
        "/healthz": {200: {"content": {"application/json": {}}}},
        "/readyz": {
            200: {"content": {"application/json": {}}},
            503: {"content": {"application/problem+json": {}}, "description": "Not ready: `detail` says why"},
        },
        "/metrics": {200: {"content": {"text/plain": {}}}},
    }
    for path in HEALTH_PATHS:
        app.add_api_route(
            path,
            route(path),
            methods=["GET"],
            tags=["health"],
            name=path.strip("/"),
            response_class=Response,
            responses=answers[path],
        )


class HealthServer:
    """The health routes on a thread of their own, for a process that has no web framework. Close it when done."""

    def __init__(self, ready: Ready, *, host: str, port: int, registry: CollectorRegistry) -> None:
        class Handler(BaseHTTPRequestHandler):
            timeout = REQUEST_TIMEOUT_S

            def do_GET(self) -> None:
                reply = health_reply(self.path.partition("?")[0], ready, registry=registry)
                status, media_type, body = reply or HealthReply(404, "text/plain", b"try /healthz, /readyz, /metrics\n")
                self.send_response(status)
                self.send_header("Content-Type", media_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Probes come every few seconds: they are not worth a line."""

        self._server = ThreadingHTTPServer((host, port), Handler)
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, name="health", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=REQUEST_TIMEOUT_S)


def serve_health(
    ready: Ready, *, host: str = "127.0.0.1", port: int = 0, registry: CollectorRegistry = REGISTRY
) -> HealthServer:
    """Serve /healthz, /readyz and /metrics from a daemon thread; port 0 picks a free one (see `.port`).

    `ready` is called on that thread. Raises OSError when the port is taken.
    """
    return HealthServer(ready, host=host, port=port, registry=registry)
