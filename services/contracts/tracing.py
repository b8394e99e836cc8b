"""Traces: one of each task, from its issue through every attempt, each grading and the queue to the training step.

    configure_tracing("rollout", run="demo", settings=config.telemetry)      once, in __main__; off without an endpoint
    record(task_id, "queue: tasks", start_s, end_s)                          something that is over, in a task's trace
    with dialogue_span(task_id, replica="rollout-0"):                        something going on, ...
        with span("attempt 1") as attempt:                                   ... and a part of it, where it is itself
            note(attempt, verdict="correct")                                 part of a trace
    close_tracing()                                                          hand over what is left

A trace's id, and that of its root span, are made of run and task, so no service has to tell another; the root is
recorded last, by whoever saw the task's end (`record_root`). Which tasks are traced follows from the id too. Times are
Unix times in seconds: services on several machines agree as far as their clocks do.

Off, every function returns at once and OpenTelemetry is not imported.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from services.contracts.config import ConfigError
from services.contracts.settings import TelemetrySection

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

ENDPOINT_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"
TRACES_PATH = "/v1/traces"
HEADER = "X-Traceparents"  # one W3C traceparent for each item of a batch, with commas between; empty: not traced
EXPORT_TIMEOUT_S = 5.0
CLOSE_MS = 5000
QUEUED_SPANS = 65_536  # those that come faster than they can be handed over are dropped

Attribute = str | int | float | bool


class _State:
    """Of this process."""

    provider: "TracerProvider | None" = None
    tracer: Any = None
    ids: Any = None
    run = ""
    share = 1.0


def configure_tracing(service: str, *, run: str, settings: TelemetrySection) -> bool:
    """Begin to trace if an endpoint is configured. Raises ConfigError when OpenTelemetry is not installed."""
    endpoint = settings.otlp_endpoint or os.environ.get(ENDPOINT_VARIABLE, "")
    if not endpoint or not settings.trace_share:
        return False
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
    except ImportError as error:
        raise ConfigError(
            "telemetry.otlp_endpoint: OpenTelemetry is not installed; pip install 'multi-attempt-rl[tracing]', "
            "or leave it empty"
        ) from error

    class Ids(RandomIdGenerator):
        """Random ids, but for a span whose ids are given."""

        given: tuple[int, int] | None = None

        def generate_trace_id(self) -> int:
            """128 bits."""
            return self.given[0] if self.given else super().generate_trace_id()

        def generate_span_id(self) -> int:
            """64 bits."""
            return self.given[1] if self.given else super().generate_span_id()

    _State.ids, _State.run, _State.share = Ids(), run, settings.trace_share
    resource = Resource.create({"service.name": service, "service.namespace": "multiattempt", "run": run})
    provider = TracerProvider(resource=resource, id_generator=_State.ids, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + TRACES_PATH, timeout=EXPORT_TIMEOUT_S)
    provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=QUEUED_SPANS))
    _State.provider, _State.tracer = provider, provider.get_tracer("multiattempt")
    return True


def close_tracing() -> None:
    """Hand over the last spans, for CLOSE_MS at most; nothing is traced afterwards."""
    provider, _State.provider, _State.tracer = _State.provider, None, None
    if provider is not None:
        provider.force_flush(CLOSE_MS)
        provider.shutdown()


def task_ids(run: str, task_id: int) -> tuple[int, int]:
    """Trace id and id of the root span of a task."""
    digest = hashlib.sha256(f"{run}:{task_id}".encode()).digest()
    return int.from_bytes(digest[:16], "big"), int.from_bytes(digest[16:24], "big")


def entry_time_s(entry_id: str) -> float:
    """When Redis took in a stream entry: its id says."""
    return int(entry_id.partition("-")[0]) / 1e3


def is_traced(task_id: int) -> bool:
    """Whether spans of this task go anywhere."""
    if _State.tracer is None:
        return False
    return _State.share >= 1 or task_ids(_State.run, task_id)[0] / 2**128 < _State.share


def record(task_id: int, name: str, start_s: float, end_s: float, **attributes: Attribute) -> None:
    """A part of a task's trace that is over."""
    if is_traced(task_id):
        span = _State.tracer.start_span(
            name, context=_of_task(task_id), start_time=_ns(start_s), attributes={"task_id": task_id, **attributes}
        )
        span.end(_ns(max(start_s, end_s)))


def record_root(task_id: int, start_s: float, end_s: float, **attributes: Attribute) -> None:
    """The whole of a task: from its issue to the end of the step that trained on it."""
    if is_traced(task_id):
        from opentelemetry.context import Context

        _State.ids.given = task_ids(_State.run, task_id)
        try:
            span = _State.tracer.start_span(
                "task", context=Context(), start_time=_ns(start_s), attributes={"task_id": task_id, **attributes}
            )
        finally:
            _State.ids.given = None
        span.end(_ns(max(start_s, end_s)))


@contextlib.contextmanager
def dialogue_span(task_id: int, **attributes: Attribute) -> Iterator[None]:
    """The dialogue of a task, going on; what is traced inside is its part."""
    if not is_traced(task_id):
        yield
        return
    attributes = {"task_id": task_id, **attributes}
    with _State.tracer.start_as_current_span("dialogue", context=_of_task(task_id), attributes=attributes):
        yield


@contextlib.contextmanager
def span(name: str, **attributes: Attribute) -> "Iterator[Span | None]":
    """A part of what is going on and traced; None where it is not."""
    if _State.tracer is None or not _is_inside():
        yield None
        return
    with _State.tracer.start_as_current_span(name, attributes=attributes) as begun:
        yield begun


def note(begun: "Span | None", **attributes: Attribute) -> None:
    """Say more about a span."""
    if begun is not None:
        begun.set_attributes(attributes)


def traceparent() -> str:
    """What is going on here, for another service to take part; empty where it is not traced."""
    if _State.tracer is None or not _is_inside():
        return ""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get("traceparent", "")


def record_parts(header: str, name: str, start_s: float, parts: Sequence[dict[str, Attribute]]) -> None:
    """One span for each item of a batch that another service asked for, until now. header: HEADER's value."""
    if _State.tracer is None or not header:
        return
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    now_ns = time.time_ns()
    for parent, attributes in zip(header.split(","), parts, strict=False):
        context = TraceContextTextMapPropagator().extract({"traceparent": parent.strip()})
        if context:
            part = _State.tracer.start_span(name, context=context, start_time=_ns(start_s), attributes=attributes)
            part.end(now_ns)


def _is_inside() -> bool:
    from opentelemetry import trace

    return trace.get_current_span().get_span_context().is_valid


def _of_task(task_id: int) -> Any:
    from opentelemetry import trace

    trace_id, span_id = task_ids(_State.run, task_id)
    sampled = trace.TraceFlags(trace.TraceFlags.SAMPLED)
    parent = trace.SpanContext(trace_id, span_id, is_remote=True, trace_flags=sampled)
    return trace.set_span_in_context(trace.NonRecordingSpan(parent))


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
