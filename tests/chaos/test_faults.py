"""One run to which replicas come and go, whose services stand still, whose disk is full: training goes on, or waits.

The tests are one story, in this order: each leaves the run as the next one finds it.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from live_run import LiveRun, environment, live_run
from processes import ROOT, free_port
from slow_network import far
from soak import audited

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]
LATENCY_S = 0.05  # each way
DISK_BYTES = 1100 << 20  # a run wants a gigabyte at its start
LEFT_BYTES = 64 << 10


class Disk:
    """A file system in memory whose size can be changed; an ordinary folder where one cannot be mounted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.is_mounted = self._mount(f"size={DISK_BYTES}", "-t", "tmpfs", "tmpfs")

    def fill(self) -> None:
        """It has next to no room left."""
        found = os.statvfs(self.folder)
        used = (found.f_blocks - found.f_bfree) * found.f_frsize
        assert self._mount(f"remount,size={used + LEFT_BYTES}")

    def make_room(self) -> None:
        assert self._mount(f"remount,size={DISK_BYTES}")

    def close(self) -> None:
        if self.is_mounted:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)

    def _mount(self, options: str, *more: str) -> bool:
        with contextlib.suppress(FileNotFoundError):
            command = ["mount", *more, "-o", options, str(self.folder)]
            return subprocess.run(command, check=False, capture_output=True).returncode == 0
        return False


class Replica:
    """One that was not there when the run began, as `multiattempt serve rollout` starts it."""

    def __init__(self, run: LiveRun, name: str, config: Path, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "services.cli", "serve", "rollout", "--config", str(config)]
        with (run.folder / "logs" / f"{name}.log").open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--replica-id", name, "--port", str(port)],
                cwd=ROOT, env=environment(), stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def dialogues(self) -> dict[str, float]:
        """How its dialogues ended."""
        return outcomes(self.url)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)


def outcomes(url: str) -> dict[str, float]:
    text = httpx.get(f"{url}/metrics", timeout=5, trust_env=False).text
    prefix = 'multiattempt_rollout_dialogues_total{outcome="'
    lines = [line.removeprefix(prefix) for line in text.splitlines() if line.startswith(prefix)]
    return {line.partition('"')[0]: float(line.rpartition(" ")[2]) for line in lines}


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    disk = Disk(tmp_path_factory.mktemp("disk"))
    yield disk
    disk.close()


@pytest.fixture(scope="module")
def run(disk: Disk, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveRun]:
    with live_run(disk.folder, terminal=tmp_path_factory.mktemp("terminal") / "terminal") as run:
        run.until_up()
        run.until_durable(2)
        yield run


@pytest.fixture(scope="module")
def added(run: LiveRun) -> Iterator[dict[str, Replica]]:
    """Two more replicas: one beside the first, one that has everything far away."""
    near_port, far_port = free_port(), free_port()
    values = json.loads((run.folder / "config.json").read_text())
    redis_port = int(values["redis"]["url"].rpartition(":")[2].partition("/")[0])
    with (
        far("127.0.0.1", redis_port, latency_s=LATENCY_S) as redis,
        far("127.0.0.1", values["grader"]["port"], latency_s=LATENCY_S) as grader,
        far("127.0.0.1", far_port, latency_s=LATENCY_S, at=("127.0.0.2", far_port)),
    ):
        values["redis"]["url"] = f"redis://127.0.0.1:{redis}/0"
        values["grader"]["url"] = f"http://127.0.0.1:{grader}"
        values["rollout"]["advertise_host"] = "127.0.0.2"
        (run.folder / "far.json").write_text(json.dumps(values))
        replicas = {
            "near": Replica(run, "near", run.folder / "config.json", near_port),
            "far": Replica(run, "far", run.folder / "far.json", far_port),
        }
        try:
            yield replicas
        finally:
            for replica in replicas.values():
                replica.kill()


def agreed(run: LiveRun, urls: list[str]) -> int | None:
    """The version that all replicas hold, under one fingerprint; None between two."""
    try:
        held = [httpx.get(f"{url}/v1/weights", timeout=2, trust_env=False).json() for url in urls]
    except httpx.HTTPError:
        return None
    if any("version" not in one for one in held) or len({one["version"] for one in held}) > 1:
        return None
    assert len({one["digest"] for one in held}) == 1, held
    version: int = held[0]["version"]
    return version


def urls(run: LiveRun, added: dict[str, Replica]) -> list[str]:
    return [f"http://127.0.0.1:{run.port('rollout-0')}", *(replica.url for replica in added.values())]


def test_replicas_that_join_take_part_though_one_is_far_away(run: LiveRun, added: dict[str, Replica]) -> None:
    run.until(lambda: agreed(run, urls(run, added)) is not None, what="three replicas at one version")
    run.until(
        lambda: all(replica.dialogues().get("completed", 0) > 0 for replica in added.values()),
        what="dialogues completed by both",
    )
    assert audited(run)["clean"]


def test_a_replica_that_stands_still_is_left_behind_and_catches_up(run: LiveRun, added: dict[str, Replica]) -> None:
    near = added["near"]
    os.killpg(near.process.pid, signal.SIGSTOP)
    try:
        stopped = time.monotonic()
        run.until_durable(run.durable() + 4)  # with what it held, when its leases had run out
        run.until(lambda: time.monotonic() - stopped > 2 * run.config.redis.lease_s, what="its leases' end")
    finally:
        os.killpg(near.process.pid, signal.SIGCONT)
    run.until(lambda: agreed(run, urls(run, added)) is not None, what="three replicas at one version again")
    assert audited(run)["clean"]
    assert near.process.poll() is None


def test_replicas_that_are_drained_leave_no_dialogue_behind(run: LiveRun, added: dict[str, Replica]) -> None:
    for replica in added.values():
        found = replica.dialogues()
        assert found.get("failed", 0) == found.get("buried", 0) == 0, found
        replica.process.send_signal(signal.SIGTERM)
        assert replica.process.wait(60) == 0
    run.until_durable(run.durable() + 4)
    audit = audited(run)
    assert audit["clean"] and audit["dropped"] == {}
    assert outcomes(f"http://127.0.0.1:{run.port('rollout-0')}").get("failed", 0) == 0


@pytest.mark.parametrize("services", [("redis", "grader"), ("rollout-0", "learner")], ids="+".join)
def test_services_may_stand_still_for_longer_than_a_lease(run: LiveRun, services: tuple[str, ...]) -> None:
    processes = [run.process(service) for service in services]
    assert all(processes)
    for service in services:
        run.signal(service, signal.SIGSTOP)
    time.sleep(2 * run.config.redis.lease_s)  # also longer than a Redis command may take
    for service in services:
        run.signal(service, signal.SIGCONT)
    run.until_durable(run.durable() + 4)
    run.until_up()
    assert [run.process(service) for service in services] == processes  # none was given up
    audit = audited(run)
    assert audit["clean"] and audit["dropped"] == {}


def test_a_full_disk_pauses_the_run_and_room_lets_it_go_on(run: LiveRun, disk: Disk) -> None:
    if not disk.is_mounted:
        pytest.skip("no file system can be mounted here: that takes root")
    lives = {service: run.process(service) for service in run.services}
    disk.fill()
    run.until(lambda: "paused" in trouble(run), what="a learner that says it is paused")
    newest = run.durable()
    run.until(lambda: "learner: paused: " in run.terminal(), what="a line for the user")
    time.sleep(5)
    assert run.durable() == newest
    disk.make_room()
    run.until_durable(newest + 4)
    run.until(lambda: "learner: goes on" in run.terminal(), what="another line for the user")
    run.until_up()
    assert {service: run.process(service) for service in run.services} == lives
    assert audited(run)["dropped"] == {}


def trouble(run: LiveRun) -> str:
    url = f"http://127.0.0.1:{run.port('learner')}/readyz"
    with contextlib.suppress(httpx.HTTPError):
        answer = httpx.get(url, timeout=2, trust_env=False)
        return "" if answer.is_success else str(answer.json()["detail"])
    return ""


def test_at_the_end_nothing_is_left_and_every_task_has_its_place(run: LiveRun) -> None:
    processes = psutil.Process(run.launcher.pid).children(recursive=True)
    assert run.stop() == 143
    assert not psutil.wait_procs(processes, timeout=10)[1]
    audit = run.audit()
    assert audit["clean"] and audit["dropped"] == {} and audit["conflicts"] == {}
