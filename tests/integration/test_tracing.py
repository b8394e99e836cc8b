"""One trace follows a task from its issue through every attempt, each grading and the queues to the training step."""

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager

import pytest
from fakes import speak
from live_grader import live_grader
from loop_fakes import MemoryPublisher, MemoryTrainer, make_config, make_ledger, make_loop
from otlp_receiver import Received, otlp_receiver
from redis.asyncio import Redis

from services.contracts import tracing
from services.contracts.config import load
from services.contracts.settings import TelemetrySection
from services.contracts.tracing import close_tracing, configure_tracing, task_ids
from services.contracts.wire import Sampling
from services.grader.client import GraderClient
from services.learner.arithmetic_model import build_tokenizer
from services.rollout.runner import Completion, DialogueRunner
from services.rollout.worker import Worker

pytestmark = pytest.mark.integration

DEADLINE_S = 60.0
TASKS = 40


class OneAnswer:
    """An engine that always says the same."""

    version = 0

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._token_ids = list(token_ids)

    async def sample(
        self,
        token_ids: Sequence[int],
        *,
        max_tokens: int,
        seed: int,
        sampling: Sampling,
        stop_ids: frozenset[int],
        is_last: Callable[[int], bool],
    ) -> Completion:
        return await speak(self._token_ids, stop_ids, is_last)


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> Iterator[Received]:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
    with otlp_receiver() as receiver:
        yield receiver
        close_tracing()


@asynccontextmanager
async def replica(redis: Redis, grader_url: str) -> AsyncIterator[None]:
    """A real worker and runner with a scripted engine and a real grader."""
    tokenizer = build_tokenizer()
    engine = OneAnswer(tokenizer.encode("so \\boxed{7}", add_special_tokens=False))
    config = load(None, ["--dialogue.system_prompt="], env={})
    async with GraderClient(grader_url) as grader:
        runner = DialogueRunner(config, engine=engine, grader=grader, tokenizer=tokenizer, replica_id="rollout-0")
        worker = Worker(
            make_ledger(redis), runner, replica_id="rollout-0", version=lambda: 10, lease_s=5, grader_timeout_s=30,
            free_places=lambda in_flight, _: 16 - in_flight,
        )  # fmt: skip
        working = asyncio.create_task(worker.run())
        try:
            yield
        finally:
            worker.drain(5)
            await working


async def test_every_trained_task_has_one_complete_trace(
    redis: Redis, received: Received, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(tracing.ENDPOINT_VARIABLE, received.url)
    with live_grader() as grader_url:
        configure_tracing("learner and rollout", run="loop", settings=TelemetrySection())
        async with replica(redis, grader_url):
            trainer = MemoryTrainer()
            await make_loop(redis, make_config(max_staleness="10"), trainer, MemoryPublisher()).run()
        deadline = time.monotonic() + DEADLINE_S
        while sum(span.service == "grader" for spans in received.traces.values() for span in spans) < TASKS:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.5)  # the grader's second attempts
    close_tracing()
    traces = received.traces
    trained = [trajectory for batch in trainer.batches for trajectory in batch]
    assert len(trained) == TASKS
    for trajectory in trained:
        trace_id, root_id = (number.to_bytes(size, "big") for number, size in
                             zip(task_ids("loop", trajectory.task_id), (16, 8), strict=True))  # fmt: skip
        spans = traces[trace_id]
        attempts = range(1, len(trajectory.attempts) + 1)
        each = [f"{what} {k}" for k in attempts for what in ("attempt", "grading")]
        whole = ["task", "issue", "queue: tasks", "dialogue", "queue: trajectories", "training step"]
        assert sorted(span.name for span in spans) == sorted([*whole, *each, *("grader" for _ in attempts)])
        by_id = {span.span_id: span for span in spans}
        assert len(by_id) == len(spans)
        for span in spans:
            above = by_id[span.parent_id].name if span.parent_id else ""
            expected = {
                "task": "",
                "dialogue": "task",
                "grader": "grading",
                "attempt": "dialogue",
                "grading": "dialogue",
            }
            assert above.split()[:1] == expected.get(span.name.split()[0], "task").split()[:1], span.name
            assert span.start_ns <= span.end_ns
        [root] = [span for span in spans if span.name == "task"]
        assert (root.span_id, root.attributes["outcome"]) == (root_id, "trained")
        assert root.start_ns <= min(span.start_ns for span in spans)
        [step] = [span for span in spans if span.name == "training step"]
        assert step.attributes["step"] in range(1, 6)
        assert {span.attributes["verdict"] for span in spans if span.name == "grader"} == {"incorrect"}
        assert {span.service for span in spans} == {"learner and rollout", "grader"}


def test_a_share_of_the_tasks_is_traced_the_same_in_every_service(received: Received) -> None:
    configure_tracing("learner", run="r", settings=TelemetrySection(otlp_endpoint=received.url, trace_share=0.25))
    chosen = [task_id for task_id in range(1000) if tracing.is_traced(task_id)]
    assert 180 < len(chosen) < 320
    for task_id in chosen[:3]:
        tracing.record(task_id, "issue", 1.0, 2.0)
    tracing.record(next(i for i in range(1000) if i not in chosen), "issue", 1.0, 2.0)
    close_tracing()
    assert set(received.traces) == {task_ids("r", i)[0].to_bytes(16, "big") for i in chosen[:3]}


def test_without_an_endpoint_nothing_is_loaded_and_nothing_happens() -> None:
    code = (
        "import sys; from services.contracts import tracing; from services.contracts.settings import TelemetrySection\n"
        "assert not tracing.configure_tracing('x', run='r', settings=TelemetrySection())\n"
        "tracing.record(1, 'a', 0, 1); tracing.record_root(1, 0, 1); assert tracing.traceparent() == ''\n"
        "with tracing.dialogue_span(1), tracing.span('b') as begun: tracing.note(begun, c=1)\n"
        "tracing.close_tracing(); print(*(name for name in sys.modules if name.startswith('opentelemetry')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")


async def test_a_collector_that_is_away_costs_nothing_but_the_traces(caplog: pytest.LogCaptureFixture) -> None:
    configure_tracing("learner", run="r", settings=TelemetrySection(otlp_endpoint="http://127.0.0.1:1"))
    for task_id in range(100):
        tracing.record(task_id, "issue", 1.0, 2.0)
    close_tracing()


@pytest.mark.parametrize(
    "header", ["nonsense", "00-zz-zz-01", ",,,", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "x" * 9000]
)
def test_a_strange_header_is_ignored(received: Received, header: str) -> None:
    configure_tracing("grader", run="r", settings=TelemetrySection(otlp_endpoint=received.url))
    tracing.record_parts(header, "grader", 1.0, [{"verdict": "correct"}])
    close_tracing()
    assert received.traces == {}
