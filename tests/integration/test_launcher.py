"""The launcher on fake services and a real Valkey: order, crashes, wrong configuration, and nothing left behind."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from services.contracts.config import load_resolved

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]


class Run:
    """A launcher in a process of its own."""

    def __init__(self, folder: Path, *flags: str, **behaviours: str) -> None:
        self.dir = folder / "fake"
        command = [sys.executable, str(Path(__file__).with_name("launch_fakes.py"))]
        command += ["--run.dir", str(folder), "--run.name", "fake", "--run.steps", "2", *flags]
        environment = {f"FAKE_{kind.upper()}": behaviour for kind, behaviour in behaviours.items()}
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err

    def started(self, kind: str) -> list[int]:
        """Every process of this kind that there was."""
        return [pid for pid, noted in self.noted().items() if noted == kind]

    def noted(self) -> dict[int, str]:
        return {int(path.name): path.read_text() for path in (self.dir / "pids").iterdir()}

    def left_behind(self) -> dict[int, str]:
        """Every process of this run that is still there."""
        return {pid: kind for pid, kind in self.noted().items() if is_running(pid)} | self.valkeys()

    def valkeys(self) -> dict[int, str]:
        folder = str((self.dir / "valkey").resolve())
        commands = {int(path.parent.name): read(path) for path in Path("/proc").glob("[0-9]*/cmdline")}
        cwds = {pid: os.path.realpath(f"/proc/{pid}/cwd") for pid, text in commands.items() if "valkey-server" in text}
        return {pid: "valkey" for pid, cwd in cwds.items() if cwd == folder}


def read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:  # it has ended
        return ""


def is_running(pid: int) -> bool:
    stat = read(Path(f"/proc/{pid}/stat"))
    return bool(stat) and stat.rpartition(")")[2].split()[0] != "Z"


def wait_for(condition: Callable[[], object], *, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def answers(client: Redis) -> bool:
    try:
        return bool(client.ping())
    except RedisError:  # it is still reading its file back
        return False


def test_a_run_goes_through_its_order_and_leaves_nothing_behind(tmp_path: Path) -> None:
    run = Run(tmp_path)
    code, out, err = run.end()
    assert (code, err) == (0, "")
    expected = (
        r"Valkey.*prepare.*starting grader, rollout-0.*is ready.*is ready.*evaluation --label before.*training.*"
        r"1/2 .*2/2 .*evaluation --label after.*evaluation --report.*done"
    )
    assert re.search(expected, out, re.DOTALL), out
    assert (run.dir / "logs" / "evaluation.out.log").read_text().count("evaluation --") == 3
    assert not run.left_behind()


def test_a_learner_that_crashes_is_started_again_with_resume(tmp_path: Path) -> None:
    run = Run(tmp_path, "--evaluation.enabled", "false", learner="crash once")
    code, out, _ = run.end()
    assert code == 0
    assert "learner ended with exit code 1; starting it again in 1 s" in out
    assert out.splitlines()[-1].endswith(f"the newest checkpoint is {run.dir / 'checkpoints' / 'step-1'}")
    assert (run.dir / "logs" / "learner.log").read_text() == "something broke\nlearner --resume\n"


def test_a_replica_that_crashes_is_started_again(tmp_path: Path) -> None:
    code, out, _ = Run(tmp_path, rollout="crash once").end()
    assert code == 0
    assert "rollout-0 ended with exit code 1" in out
    assert "rollout-0 is ready" in out


@pytest.mark.parametrize("kind", ["prepare", "rollout", "learner"])
def test_a_wrong_configuration_ends_the_run_with_its_line(tmp_path: Path, kind: str) -> None:
    run = Run(tmp_path, "--evaluation.enabled", "false", **{kind: "misconfigured"})
    code, _, err = run.end()
    assert code == 2
    assert err.startswith(f"multiattempt: error: {kind}.device: no such device") and err.count("\n") == 1
    assert not run.left_behind()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_every_process_and_the_last_line_says_how_to_go_on(
    tmp_path: Path, number: signal.Signals
) -> None:
    run = Run(tmp_path, "--evaluation.enabled", "false", learner="hang")
    wait_for((run.dir / "learner-hangs").exists)
    assert {"learner", "grandchild", "grader", "rollout", "valkey"} <= set(run.left_behind().values())
    (run.dir / "checkpoints" / "step-1").mkdir(parents=True)
    run.process.send_signal(number)
    code, out, _ = run.end()
    assert code == 128 + number
    assert out.splitlines()[-1].endswith("stopped; to go on: again --resume")
    assert not run.left_behind()


def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    run = Run(tmp_path, "--evaluation.enabled", "false", learner="stubborn")
    wait_for((run.dir / "learner-hangs").exists)
    started = time.monotonic()
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    run.process.send_signal(signal.SIGINT)
    assert run.end()[0] == 130
    assert time.monotonic() - started < 10
    assert not run.left_behind()


@pytest.mark.parametrize("behaviour", ["hang", "stubborn"])
def test_a_killed_launcher_leaves_nothing_behind(tmp_path: Path, behaviour: str) -> None:
    run = Run(tmp_path, "--evaluation.enabled", "false", learner=behaviour)
    wait_for((run.dir / "learner-hangs").exists)
    run.process.kill()
    run.process.communicate()
    wait_for(lambda: not run.left_behind())


def test_a_signal_while_valkey_starts_leaves_nothing_behind(tmp_path: Path) -> None:
    run = Run(tmp_path)
    wait_for((run.dir / "valkey").exists)
    run.process.send_signal(signal.SIGINT)
    assert run.end()[0] == 130
    assert not run.valkeys()


def test_a_killed_valkey_comes_back_with_its_data(tmp_path: Path) -> None:
    run = Run(tmp_path, "--evaluation.enabled", "false", learner="hang")
    wait_for((run.dir / "learner-hangs").exists)
    url = load_resolved(run.dir / "config.json").redis.url
    client = Redis.from_url(url, retry=Retry(NoBackoff(), 0))
    client.set("kept", "yes")
    time.sleep(1.2)  # appendfsync everysec
    (first,) = run.valkeys()
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: run.valkeys() and first not in run.valkeys())
    wait_for(lambda: answers(client))
    assert client.get("kept") == b"yes"
    client.close()
    run.process.send_signal(signal.SIGTERM)
    assert run.end()[0] == 143
    assert not run.left_behind()


def test_a_service_that_was_ready_once_is_started_again_whatever_it_misses_then(tmp_path: Path) -> None:
    run = Run(tmp_path, "--evaluation.enabled", "false", learner="hang", grader="misconfigured later")
    wait_for((run.dir / "learner-hangs").exists)
    (grader,) = [pid for pid, kind in run.left_behind().items() if kind == "grader"]
    os.kill(grader, signal.SIGKILL)
    wait_for(lambda: len(run.started("grader")) == 3)  # the second of them missed something
    run.process.send_signal(signal.SIGTERM)
    code, out, _ = run.end()
    assert code == 143
    assert "grader ended with signal SIGKILL; starting it again in 1 s" in out
    assert "grader ended with exit code 2; starting it again in 2 s" in out
    assert not run.left_behind()


def test_what_keeps_the_learner_is_told(tmp_path: Path) -> None:
    run = Run(tmp_path, "--evaluation.enabled", "false", learner="paused")
    lines: list[str] = []
    wait_for(lambda: (lines.append(run.process.stdout.readline()), "learner: paused: no room" in lines[-1])[1])
    run.process.send_signal(signal.SIGTERM)
    assert run.end()[0] == 143


def test_a_second_launcher_of_the_same_run_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path, "--evaluation.enabled", "false", learner="hang")
    wait_for((run.dir / "learner-hangs").exists)
    code, _, err = Run(tmp_path).end()
    assert code == 2
    assert "another multiattempt is running" in err and err.count("\n") == 1
    assert {"learner", "valkey"} <= set(run.left_behind().values())
    run.process.send_signal(signal.SIGTERM)
    assert run.end()[0] == 143
