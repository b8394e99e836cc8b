"""A collector of traces by OTLP over HTTP, in this process."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)


class ReceivedSpan(NamedTuple):
    service: str
    name: str
    trace_id: bytes
    span_id: bytes
    parent_id: bytes  # empty: a root
    start_ns: int
    end_ns: int
    attributes: dict[str, object]


class Received:
    """What came so far, by trace."""

    def __init__(self) -> None:
        self.url = ""
        self._lock = threading.Lock()
        self._spans: list[ReceivedSpan] = []

    def add(self, request: ExportTraceServiceRequest) -> None:
        with self._lock:
            for resource in request.resource_spans:
                names = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
                for span in (span for scope in resource.scope_spans for span in scope.spans):
                    values = {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in span.attributes}
                    self._spans.append(
                        ReceivedSpan(
                            names["service.name"], span.name, span.trace_id, span.span_id, span.parent_span_id,
                            span.start_time_unix_nano, span.end_time_unix_nano, values,
                        )
                    )  # fmt: skip

    @property
    def traces(self) -> dict[bytes, list[ReceivedSpan]]:
        with self._lock:
            found: dict[bytes, list[ReceivedSpan]] = {}
            for span in self._spans:
                found.setdefault(span.trace_id, []).append(span)
            return found


@contextmanager
def otlp_receiver() -> Iterator[Received]:
    received = Received()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.path == "/v1/traces", self.path
            received.add(ExportTraceServiceRequest.FromString(body))
            reply = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    received.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield received
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
