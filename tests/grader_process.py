"""The grader as a real process, its workers within reach."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from services.contracts.config import RunConfig, to_toml_dict
from services.contracts.settings import GraderSection
from tests.processes import free_port


@dataclass(frozen=True)
class Grader:
    process: subprocess.Popen[bytes]
    client: httpx.Client
    num_workers: int

    def grade(self, answer: str, gold: str | list[str], **more: object) -> dict[str, object]:
        reply = self.client.post("/v1/grade", json={"response": rf"\boxed{{{answer}}}", "gold": gold, **more})
        assert reply.status_code == 200, reply.text
        return dict(reply.json())

    def fork_server_pid(self) -> int | None:
        return next(iter(children(self.process.pid)), None)

    def worker_pids(self) -> list[int]:
        server = self.fork_server_pid()
        return children(server) if server is not None else []

    def is_complete(self) -> bool:
        """Whether it answers, all its workers are warm, and the killed ones are gone."""
        try:
            is_ready = self.metric("multiattempt_grader_workers_ready") == self.num_workers
            return is_ready and len(self.worker_pids()) == self.num_workers
        except httpx.ConnectError:
            return False

    def metric(self, name: str) -> float:
        lines = self.client.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    def failures(self, cause: str) -> float:
        return self.metric(f'multiattempt_grader_worker_failures_total{{cause="{cause}"}}')


def children(pid: int) -> list[int]:
    """The living ones: a killed child that is not reaped yet is none."""
    try:
        found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return [child for child in found if "worker_process" in Path(f"/proc/{child}/cmdline").read_text()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def until(happened: Callable[[], bool], deadline_s: float = 30.0) -> None:
    end = time.monotonic() + deadline_s
    while not happened():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


@contextmanager
def running(directory: Path, **settings: object) -> Iterator[Grader]:
    """A grader with these settings, complete at the start; SIGTERM at the end must end it well."""
    section = GraderSection.model_validate({"port": free_port(), "workers": 2, **settings})
    path = directory / "config.json"
    path.write_text(json.dumps(to_toml_dict(RunConfig(grader=section))))
    with (
        (directory / "grader.log").open("wb") as log,
        httpx.Client(base_url=f"http://127.0.0.1:{section.port}", timeout=60) as client,
    ):
        process = subprocess.Popen([sys.executable, "-m", "services.grader", "--config", str(path)], stderr=log)
        grader = Grader(process, client, section.workers)
        try:
            until(grader.is_complete)
            yield grader
            process.send_signal(signal.SIGTERM)
            assert process.wait(15) == 0
        finally:
            process.kill()
            process.wait(15)
