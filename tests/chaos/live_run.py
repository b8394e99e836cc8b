"""A whole run as `multiattempt train` starts it, for tests that kill parts of it and look at what becomes of it."""

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
from boxy_model import save_model
from processes import ROOT

from services.contracts.config import RunConfig, load_resolved

CONFIG = Path(__file__).with_name("run.toml")
POLL_S = 0.002  # a weight transfer of the tiny model takes 30 ms
LOOK_S = 0.2
START_S = 600.0  # on a machine that others use too
STOP_S = 90.0

Line = dict[str, Any]


class Log:
    """The JSON lines that a service adds to its log, in order; other lines are passed over."""

    def __init__(self, path: Path) -> None:
        self._path, self._position = path, 0
        self.lines: list[Line] = []

    def read(self) -> list[Line]:
        """Those added since the last call."""
        if not self._path.exists() or self._path.stat().st_size <= self._position:
            return []
        with self._path.open("rb") as file:
            file.seek(self._position)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._position += len(whole)
        new = [parsed for text in whole.splitlines() if (parsed := parse(text)) is not None]
        self.lines += new
        return new


def parse(text: bytes) -> Line | None:
    try:
        line = json.loads(text)
    except ValueError:  # a torn line of a killed process, or what a library prints
        return None
    return line if isinstance(line, dict) and "msg" in line else None


@dataclass
class Outage:
    """A service that was up is not: from the moment it was killed."""

    began: float  # monotonic
    pids: set[int]  # of the lives that were killed
    ended: float | None = None


@dataclass
class Kill:
    """One kill."""

    service: str
    moment: str
    was_up: bool
    at: float


@dataclass
class LiveRun:
    """The launcher's process and what it started. Use `start`."""

    folder: Path  # the run's
    launcher: subprocess.Popen[bytes]
    terminal_path: Path
    kills: list[Kill] = field(default_factory=list)
    outages: dict[str, list[Outage]] = field(default_factory=dict)
    digests: list[tuple[float, str, int, str]] = field(default_factory=list)  # Unix time, replica, version, digest
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._learner = Log(self.folder / "logs" / "learner.log")
        self._changed = threading.Condition()
        self._ended = threading.Event()
        self._up: dict[str, int] = {}  # service -> process that was seen to be up last
        self._threads = [threading.Thread(target=one, daemon=True) for one in (self._follow, self._watch)]

    @functools.cached_property
    def config(self) -> RunConfig:
        return load_resolved(self.folder / "config.json")

    @property
    def services(self) -> list[str]:
        replicas = [f"rollout-{i}" for i in range(self.config.rollout.replicas)]
        return ["redis", "grader", *replicas, "learner"]

    # What is there

    def process(self, service: str) -> psutil.Process | None:
        """The service's process now, the leader of its group."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.launcher.pid).children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if name_of(child.cmdline()) == service and child.status() != psutil.STATUS_ZOMBIE:
                        return child
        return None

    def port(self, service: str) -> int:
        if service == "grader":
            return self.config.grader.port
        if service == "learner":
            return self.config.learner.metrics_port
        found = self.process(service)
        words = found.cmdline() if found else []
        return int(words[words.index("--port") + 1]) if "--port" in words else 0

    def is_up(self, service: str) -> bool:
        """Whether it answers that it can do its work."""
        if service == "redis":
            return pings(self.config)
        port = self.port(service)
        with contextlib.suppress(httpx.HTTPError):
            return bool(port) and httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=1, trust_env=False).is_success
        return False

    def lines(self) -> list[Line]:
        """What the learner has logged, over all its lives."""
        with self._changed:
            return list(self._learner.lines)

    def steps(self) -> list[Line]:
        return [line for line in self.lines() if line["msg"] == "step"]

    def durable(self) -> int:
        """Version of the newest checkpoint."""
        names = [path.name for path in (self.folder / "checkpoints").glob("v*")]
        return max((int(name[1:]) for name in names), default=0)

    def weights(self, service: str) -> dict[str, Any] | None:
        """What a replica says of its weights."""
        with contextlib.suppress(httpx.HTTPError, psutil.NoSuchProcess):
            answer = httpx.get(f"http://127.0.0.1:{self.port(service)}/v1/weights", timeout=2, trust_env=False)
            return answer.json() if answer.is_success else None
        return None

    def terminal(self) -> str:
        """What the user has seen."""
        return self.terminal_path.read_text()

    # Waiting

    def until(self, condition: Callable[[], object], *, what: str, timeout_s: float = START_S) -> None:
        """Wait for it. Raises AssertionError, with what the user has seen, when it does not come or the run ends."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.launcher.poll() is None, f"the run ended while waiting for {what}:\n{self.terminal()[-3000:]}"
            assert time.monotonic() < deadline, f"{what}: not within {timeout_s:g} s\n{self.terminal()[-3000:]}"
            time.sleep(LOOK_S)

    def until_up(self, *services: str) -> None:
        """Wait until these answer, all when none is named."""
        for service in services or self.services:
            self.until(lambda name=service: self.is_up(name), what=f"{service} to be up")

    def until_durable(self, version: int) -> None:
        self.until(lambda: self.durable() >= version, what=f"checkpoint {version}")

    def await_phase(self, phase: str, timeout_s: float) -> bool:
        """Wait until the learner's log says that it begins; at once then. False: it did not in time."""
        with self._changed:
            seen = len(self._learner.lines)

            def begun() -> bool:
                return any(line.get("phase") == phase for line in self._learner.lines[seen:])

            return self._changed.wait_for(begun, timeout_s)

    def await_file(self, pattern: str, timeout_s: float) -> bool:
        """Wait until a file that was not there appears in the run's folder. False: it did not in time."""
        before, deadline = set(self.folder.glob(pattern)), time.monotonic() + timeout_s
        while not set(self.folder.glob(pattern)) - before:
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
        return True

    # Killing

    def kill(self, service: str, moment: str, *, part: str = "all") -> bool:
        """kill -9. False: there is no process to be killed.

        part: all its processes; the "leader" alone; or a replica's engine, its "child".
        """
        process = self.process(service)
        if process is None:
            return False
        was_up, victim = self._up.get(service) == process.pid, process.pid
        if part == "child" and service.startswith("rollout"):
            victim = next(
                (child.pid for child in process.children() if "tracker" not in " ".join(cmdline(child))), victim
            )
        now = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if part == "all" else os.kill)(victim, signal.SIGKILL)
        self.kills.append(Kill(service, moment, was_up, now))
        outages = self.outages.setdefault(service, [])
        if outages and outages[-1].ended is None:
            outages[-1].pids.add(process.pid)
        else:
            outages.append(Outage(now, {process.pid}))
        return True

    def signal(self, service: str, number: signal.Signals) -> None:
        """A signal to all processes of a service."""
        process = self.process(service)
        assert process is not None, service
        os.killpg(process.pid, number)

    def audit(self) -> Line:
        """`multiattempt audit --json`."""
        command = [sys.executable, "-m", "services.cli", "audit", str(self.folder), "--json"]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
        assert done.stdout, done.stderr
        found: Line = json.loads(done.stdout)
        return found

    def stop(self) -> int:
        """Ctrl-C's way to the end; the launcher's exit code."""
        self._ended.set()
        self.launcher.send_signal(signal.SIGTERM)
        try:
            code = self.launcher.wait(STOP_S)
        finally:
            self.end()
        return code

    def end(self) -> None:
        """Whatever is left is killed."""
        self._ended.set()
        with contextlib.suppress(psutil.NoSuchProcess):
            left = psutil.Process(self.launcher.pid).children(recursive=True)
            self.launcher.kill()  # its watchdog ends the rest
            psutil.wait_procs(left, timeout=20)
        self.launcher.wait(20)
        for thread in self._threads:
            thread.join(10)

    def begin(self) -> None:
        for thread in self._threads:
            thread.start()

    def _follow(self) -> None:
        while not self._ended.is_set():
            with self._changed:
                if self._learner.read():
                    self._changed.notify_all()
            time.sleep(POLL_S)

    def _watch(self) -> None:
        """Notes who is up, when an outage ends, and which weights the replicas say they have."""
        while not self._ended.wait(LOOK_S):
            if not (self.folder / "config.json").exists():
                continue
            try:
                self._look()
            except (psutil.NoSuchProcess, ValueError, OSError) as error:  # it was killed while it was looked at
                self.failures.append(repr(error))

    def _look(self) -> None:
        for service in self.services:
            process = self.process(service)
            if process is None or not self.is_up(service):
                continue
            self._up[service] = process.pid
            outage = self.outages.get(service, [None])[-1]
            if outage is not None and outage.ended is None and process.pid not in outage.pids:
                outage.ended = time.monotonic()
            if service.startswith("rollout") and (weights := self.weights(service)):
                for swap in weights["history"]:
                    loaded_at = datetime.fromisoformat(swap["loaded_at"]).timestamp()
                    one = (loaded_at, service, swap["version"], swap["digest"])
                    if one not in self.digests[-200:]:
                        self.digests.append(one)


def name_of(command: list[str]) -> str:
    """Which service a command starts; empty: none."""
    for kind in ("grader", "learner", "rollout"):
        if f"services.{kind}" in command:
            return command[command.index("--replica-id") + 1] if kind == "rollout" else kind
    return "redis" if command and "valkey-server" in command[0] else ""


def cmdline(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.NoSuchProcess):
        words: list[str] = process.cmdline()
        return words
    return []


def pings(config: RunConfig) -> bool:
    host, _, port = config.redis.url.removeprefix("redis://").partition("/")[0].partition(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1) as connection:
        connection.sendall(b"PING\r\n")
        return connection.recv(64).startswith(b"+PONG")
    return False


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


@contextlib.contextmanager
def live_run(folder: Path, *flags: str, terminal: Path | None = None) -> Iterator[LiveRun]:
    """A run in `folder`, from its start until everything of it has ended.

    flags: settings, `--section.key=value`. terminal: file for what a user would see, by default in the folder too.
    """
    model = folder / "model"
    if not model.exists():
        save_model(model)
    command = [sys.executable, "-m", "services.cli", "train", str(CONFIG), f"--run.dir={folder}"]
    command += [f"--model.path={model}", *flags]
    terminal = terminal or folder / "terminal"
    with terminal.open("wb") as file:
        launcher = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=file, stderr=file, stdin=subprocess.DEVNULL
        )
    run = LiveRun(folder / "chaos", launcher, terminal)
    run.begin()
    try:
        run.until((run.folder / "config.json").exists, what="the run's folder")
        yield run
    finally:
        run.end()
