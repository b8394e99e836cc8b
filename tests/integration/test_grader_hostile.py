"""The grader as a real process under hostile text: every item answered in time, the well-behaved ones undisturbed."""

import asyncio
import os
import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest

from services.contracts.wire import Verdict
from tests.grader_process import Grader, children, running, until
from tests.hostile_inputs import ALL, AS_ANSWER, AS_BOTH, AS_GOLD, AS_RESPONSE, Hostile, boxed
from tests.integration.test_grader_injection import MARK, PAYLOADS

pytestmark = pytest.mark.integration

SWEEP_TIMEOUT_S = 1.0
DEADLINE_SLACK_S = 0.5  # the contract, on top of the deadline
MACHINE_SLACK_S = 2.0  # what a busy machine may add to the time on the wall
SWEPT = AS_ANSWER + AS_RESPONSE + (AS_GOLD + AS_BOTH)[::3]
NUM_SAMPLED = 24  # of the sweep, for the default deadline
VERDICTS = {verdict.value for verdict in Verdict}


@pytest.fixture(scope="module")
def grader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grader]:
    with running(tmp_path_factory.mktemp("run"), timeout_s=SWEEP_TIMEOUT_S) as grader:
        yield grader


class Bystander:
    """A well-behaved client beside the hostile ones: what it asks is easy, and it notes every answer."""

    def __init__(self, grader: Grader) -> None:
        self._url = grader.client.base_url
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.verdicts: list[str] = []

    def __enter__(self) -> "Bystander":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(60)

    def _run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=60) as client:
            while not self._is_over.is_set():
                number = len(self.verdicts)
                body = {"response": boxed(f"{number}+b"), "gold": f"b+{number}"}
                self.verdicts.append(client.post("/v1/grade", json=body).json()["verdict"])
                time.sleep(0.02)


async def sweep(grader: Grader, inputs: Sequence[Hostile], *, timeout_s: float) -> dict[str, str]:
    """Grade each input in a request of its own, as many at once as there are workers; the verdicts by name."""
    verdicts: dict[str, str] = {}
    left = iter(inputs)

    async def client() -> None:
        async with httpx.AsyncClient(base_url=grader.client.base_url, timeout=60) as http:
            for hostile in left:
                body = {"response": hostile.response, "gold": hostile.gold, "extraction": "auto"}
                content = httpx.Request("POST", "http://x", json=_escaped(body)).content
                started = time.monotonic()
                reply = await http.post("/v1/grade", content=content, headers={"content-type": "application/json"})
                seconds = time.monotonic() - started
                assert reply.status_code == 200, (hostile.name, reply.text[:300])
                result = reply.json()
                assert result["verdict"] in VERDICTS, hostile.name
                assert result["elapsed_ms"] <= (timeout_s + DEADLINE_SLACK_S) * 1000, hostile.name
                assert seconds <= timeout_s + DEADLINE_SLACK_S + MACHINE_SLACK_S, hostile.name
                verdicts[hostile.name] = result["verdict"]

    await asyncio.gather(*(client() for _ in range(grader.num_workers)))
    return verdicts


def _escaped(body: dict[str, str]) -> dict[str, str]:
    """httpx cannot send a lone surrogate; what a client's JSON library makes of one is a question mark."""
    return {key: value.encode("utf-8", "replace").decode() for key, value in body.items()}


async def test_every_hostile_input_is_answered_in_time_and_disturbs_nobody(grader: Grader) -> None:
    with Bystander(grader) as bystander:
        verdicts = await sweep(grader, SWEPT, timeout_s=SWEEP_TIMEOUT_S)
    assert len(verdicts) == len(SWEPT) >= 250
    assert len(bystander.verdicts) > 20 and set(bystander.verdicts) == {"correct"}
    assert not [name for name, verdict in verdicts.items() if name.startswith("answer") and verdict == "correct"]
    assert grader.failures("crash") == 0 == grader.failures("start")
    until(grader.is_complete)


async def test_a_batch_of_hostile_inputs_costs_its_clean_items_nothing(grader: Grader) -> None:
    some = random.Random(1).sample(AS_ANSWER, 40)
    items = [{"response": hostile.response, "gold": hostile.gold} for hostile in some]
    items[::4] = [{"response": boxed(f"{n}+c"), "gold": f"c+{n}"} for n in range(10)]
    reply = grader.client.post("/v1/grade/batch", json={"items": [_escaped(item) for item in items]})
    verdicts = [result["verdict"] for result in reply.json()["results"]]
    assert verdicts[::4] == ["correct"] * 10
    assert set(verdicts) <= VERDICTS


def test_payloads_leave_no_mark_and_start_no_process(grader: Grader) -> None:
    known = {grader.process.pid, grader.fork_server_pid(), *grader.worker_pids()}
    for payload in PAYLOADS[::3]:
        grader.grade(payload.replace("{", r"\{").replace("}", r"\}"), payload)
    assert not Path(MARK).exists() and not Path(f"/proc/{grader.process.pid}/cwd/{MARK}").exists()
    alive = {*_descendants(grader.process.pid)}
    assert len(alive - known) <= grader.num_workers  # replaced workers at most
    assert len(alive) == grader.num_workers + 1


def _descendants(pid: int) -> list[int]:
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [pid for child in found for pid in (child, *_descendants(child))]


async def test_a_fork_server_killed_in_the_middle_of_items_is_replaced_and_no_verdict_is_lost(grader: Grader) -> None:
    until(grader.is_complete)
    killed = grader.fork_server_pid()
    assert killed is not None
    async with httpx.AsyncClient(base_url=grader.client.base_url, timeout=60) as client:
        bodies = [{"response": boxed(f"{n}+d"), "gold": f"d+{n}"} for n in range(300)]
        grading = asyncio.create_task(client.post("/v1/grade/batch", json={"items": bodies}))
        await asyncio.sleep(0.05)
        os.kill(killed, signal.SIGKILL)
        results = (await grading).json()["results"]
    assert [result["verdict"] for result in results] == ["correct"] * 300
    assert grader.fork_server_pid() != killed
    until(grader.is_complete)


def test_a_killed_grader_takes_its_processes_with_it(tmp_path: Path) -> None:
    pids: list[int | None] = []
    with pytest.raises(AssertionError):  # its end is not a good one
        kill_and_wait(tmp_path, pids)
    assert len(pids) == 2 and not any(map(is_alive, pids))


def kill_and_wait(directory: Path, pids: list[int | None]) -> None:
    with running(directory, workers=1) as grader:
        pids += [grader.fork_server_pid(), *grader.worker_pids()]
        os.kill(grader.process.pid, signal.SIGKILL)
        until(lambda: not any(map(is_alive, pids)))


def is_alive(pid: int | None) -> bool:
    return Path(f"/proc/{pid}/fd/0").exists()


async def test_with_the_default_deadline_too(tmp_path: Path) -> None:
    some = random.Random(2).sample(ALL, NUM_SAMPLED)
    with running(tmp_path) as grader:
        assert len(await sweep(grader, some, timeout_s=2.0)) == NUM_SAMPLED


async def test_a_full_queue_is_503_with_retry_after_and_passes(tmp_path: Path) -> None:
    with running(tmp_path, workers=1, queue_size=40, timeout_s=3.0) as grader:
        os.kill(grader.worker_pids()[0], signal.SIGSTOP)  # nothing moves until the deadline
        async with httpx.AsyncClient(base_url=grader.client.base_url, timeout=60) as client:

            async def send(n: int) -> httpx.Response:
                return await client.post("/v1/grade", json={"response": boxed(f"{n}+f"), "gold": f"f+{n}"})

            replies = await asyncio.gather(*(send(n) for n in range(60)))
            refused = [reply for reply in replies if reply.status_code == 503]
            assert len(refused) in (19, 20) and {reply.headers["retry-after"] for reply in refused} == {"1"}
            assert {reply.headers["content-type"] for reply in refused} == {"application/problem+json"}
            verdicts = [reply.json()["verdict"] for reply in replies if reply.status_code == 200]
            assert verdicts.count("timeout") == 1 and verdicts.count("correct") == len(verdicts) - 1
            assert (await send(99)).json()["verdict"] == "correct"


async def test_sigterm_finishes_what_was_accepted(tmp_path: Path) -> None:
    with running(tmp_path, workers=1) as grader:
        async with httpx.AsyncClient(base_url=grader.client.base_url, timeout=60) as client:
            bodies = [{"response": boxed(f"{n}g+1"), "gold": f"1+{n}g"} for n in range(400)]
            grading = asyncio.create_task(client.post("/v1/grade/batch", json={"items": bodies}))
            await asyncio.sleep(0.1)
            assert not grading.done()
            grader.process.send_signal(signal.SIGTERM)
            results = (await grading).json()["results"]
        assert [result["verdict"] for result in results] == ["correct"] * 400
        assert grader.process.wait(15) == 0


def test_the_largest_batch_is_served_with_default_settings(tmp_path: Path) -> None:
    with running(tmp_path) as grader:
        items = [{"response": boxed(f"{n}"), "gold": f"{n}.0"} for n in range(10_000)]
        results = grader.client.post("/v1/grade/batch", json={"items": items}).json()["results"]
        assert {result["verdict"] for result in results} == {"correct"} and len(results) == 10_000
        again = grader.client.post("/v1/grade/batch", json={"items": items}).json()["results"]
        assert all(result["cached"] for result in again)


def test_it_is_not_ready_before_a_worker_has_answered(tmp_path: Path) -> None:
    with running(tmp_path, workers=1) as grader:
        server = grader.fork_server_pid()
        assert server is not None and grader.client.get("/readyz").status_code == 200
        os.kill(server, signal.SIGKILL)
        until(lambda: grader.client.get("/readyz").status_code == 503, deadline_s=5)
        assert grader.client.get("/healthz").status_code == 200
        until(lambda: grader.client.get("/readyz").status_code == 200)
        assert len(children(grader.process.pid)) == 1
