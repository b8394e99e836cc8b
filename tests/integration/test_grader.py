"""The grader as a real process, over HTTP: verdicts, protocols, hostile input, dying workers, start-up errors."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.grader_process import Grader, running, until

pytestmark = pytest.mark.integration

TIMEOUT_S = 2.0


@pytest.fixture(scope="module")
def grader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grader]:
    with running(tmp_path_factory.mktemp("run"), timeout_s=TIMEOUT_S, queue_size=64) as grader:
        yield grader


def test_verdicts_come_with_their_layer_and_the_answer_found(grader: Grader) -> None:
    right = grader.grade(r"\frac{1}{4}", "0.25", id="a")
    assert right | {"elapsed_ms": 0} == {
        "id": "a", "correct": True, "verdict": "correct", "extracted": r"\frac{1}{4}", "method": "numeric",
        "elapsed_ms": 0, "cached": False,
    }  # fmt: skip
    assert grader.grade(r"\frac{1}{4}", "0.25")["cached"] is True
    assert grader.grade("700", "7")["verdict"] == "incorrect"
    assert grader.grade("", "7")["verdict"] == "no_answer"
    assert grader.grade("7", "$$")["verdict"] == "unparsable_gold"
    assert grader.grade("y+x", ["z", "x+y"])["method"] == "symbolic"


def test_a_batch_keeps_its_order_and_a_stuck_worker_costs_one_item_its_verdict(grader: Grader) -> None:
    until(grader.is_complete)
    os.kill(grader.worker_pids()[0], signal.SIGSTOP)
    items = [{"response": rf"\boxed{{{n}+a}}", "gold": f"a+{n % 3}", "id": str(n)} for n in range(12)]
    started = time.monotonic()
    results = grader.client.post("/v1/grade/batch", json={"items": items}).json()["results"]
    assert time.monotonic() - started < TIMEOUT_S + 1.5
    assert [result["id"] for result in results] == [str(n) for n in range(12)]
    right = ["correct"] * 3 + ["incorrect"] * 9
    verdicts = [result["verdict"] for result in results]
    assert verdicts.count("timeout") == 1
    assert all(verdict in (wanted, "timeout") for verdict, wanted in zip(verdicts, right, strict=True))


async def test_a_stopped_worker_is_killed_at_the_deadline_while_the_other_goes_on(grader: Grader) -> None:
    until(grader.is_complete)
    stopped = grader.worker_pids()[0]
    os.kill(stopped, signal.SIGSTOP)
    async with httpx.AsyncClient(base_url=grader.client.base_url, timeout=20) as client:

        async def timed(n: int) -> tuple[str, float]:
            started = time.monotonic()
            reply = await client.post("/v1/grade", json={"response": rf"\boxed{{{n}}}", "gold": f"{n}.0"})
            return reply.json()["verdict"], time.monotonic() - started

        outcomes = await asyncio.gather(*(timed(n) for n in range(100, 130)))
    late = [outcome for outcome in outcomes if outcome[0] == "timeout"]
    assert len(late) == 1 and TIMEOUT_S <= late[0][1] < TIMEOUT_S + 1
    assert all(verdict == "correct" and seconds < 1 for verdict, seconds in set(outcomes) - set(late))
    assert grader.metric('multiattempt_grader_worker_failures_total{cause="deadline"}') >= 1
    until(lambda: len(grader.worker_pids()) == 2 and stopped not in grader.worker_pids())


def test_a_killed_worker_is_replaced_and_no_verdict_is_lost(grader: Grader) -> None:
    until(grader.is_complete)
    killed = grader.worker_pids()
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    assert [grader.grade(f"{n}", f"{n}.0")["verdict"] for n in range(200, 206)] == ["correct"] * 6
    until(lambda: len(grader.worker_pids()) == 2 and not set(killed) & set(grader.worker_pids()))
    assert grader.metric('multiattempt_grader_worker_failures_total{cause="crash"}') >= 2


def test_more_items_than_the_queue_ever_holds_are_refused_for_good(grader: Grader) -> None:
    items = [{"response": rf"\boxed{{{n}}}", "gold": f"{n}.0"} for n in range(300, 365)]
    reply = grader.client.post("/v1/grade/batch", json={"items": items})
    assert reply.status_code == 413 and "grader.queue_size is 64" in reply.json()["detail"]
    assert reply.headers["content-type"] == "application/problem+json"


def test_health_metrics_and_documentation_are_there(grader: Grader) -> None:
    assert grader.client.get("/readyz").status_code == 200
    assert "multiattempt_grader_items_total" in grader.client.get("/metrics").text
    assert "/v1/grade/batch" in grader.client.get("/openapi.json").json()["paths"]
    assert grader.client.get("/docs").status_code == 200


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--port", "{taken}"], "grader.port"),
        (["--workers", "0"], "grader.workers"),
        (["--config", "/nowhere/config.json"], "/nowhere/config.json"),
        (["--port", "0", "--host", "203.0.113.7"], "203.0.113.7"),
    ],
)
def test_a_configuration_error_is_one_line_and_exit_code_2(grader: Grader, flags: list[str], says: str) -> None:
    flags = [flag.format(taken=grader.client.base_url.port) for flag in flags]
    done = subprocess.run(
        [sys.executable, "-m", "services.grader", *flags], capture_output=True, timeout=20, check=False
    )
    assert done.returncode == 2
    assert says in done.stderr.decode() and done.stderr.count(b"\n") == 1


def test_the_grader_loads_no_training_library() -> None:
    code = "import sys, services.grader.app, services.grader.__main__; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=30, check=True)
    assert not {"torch", "vllm", "deepspeed", "transformers", "redis", "httpx"} & set(done.stdout.decode().split())
