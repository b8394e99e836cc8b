"""Starts the services of one run on this machine, in order; keeps them alive; stops them.

A service that crashes is started again after a pause that doubles; one that says its configuration is wrong (exit
code 2) ends the run. Every process is the head of a group of its own, so that a stop reaches what it started.
"""

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

from services.cli import services
from services.cli.preflight import has_checkpoints
from services.cli.progress import Progress
from services.cli.services import Service
from services.cli.watchdog import Watchdog
from services.contracts.config import ConfigError, RunConfig, to_toml_dict
from services.contracts.valkey import EmbeddedValkey

EXIT_CONFIG = 2
EXIT_STOPPED = 143  # the learner was told to stop and saved what it had
EXIT_INTERRUPTED = 130
GRACE_S = 20.0  # between SIGTERM and SIGKILL: a checkpoint, dialogues in flight
FIRST_PAUSE_S, LAST_PAUSE_S = 1.0, 30.0
HEALTHY_S = 60.0  # a service that lived this long starts its pauses anew
MAX_CRASHES = 6  # in a row, none of them healthy


class ServiceFailed(RuntimeError):
    """A service cannot be kept alive; the run ends with exit code 1."""


class Supervisor:
    """The processes of one run."""

    def __init__(self, run_dir: Path, progress: Progress) -> None:
        self._logs = run_dir / "logs"
        self._logs.mkdir(parents=True, exist_ok=True)
        self._progress = progress
        self._watchdog = Watchdog()
        self._alive: dict[str, asyncio.subprocess.Process] = {}
        self._keeping: list[asyncio.Task[None]] = []

    def watch(self, group: int) -> None:
        """Have a process group that somebody else started ended with the launcher."""
        self._watchdog.watch(group)

    async def run_once(self, name: str, command: Sequence[str], environment: dict[str, str]) -> None:
        """Run a process to its end, forwarding its lines. Raises ConfigError for exit code 2, else ServiceFailed."""
        process = await self._spawn(name, command, environment, stdout=asyncio.subprocess.PIPE)
        assert process.stdout is not None
        async for line in process.stdout:
            self._progress.say(line.decode(errors="replace").rstrip())
        self._check(name, await self._ended(name, process))

    def keep(self, service: Service) -> None:
        """Start a service and start it again whenever it crashes, until `stop`."""
        self._keeping.append(asyncio.create_task(self._keep(service), name=service.name))

    async def until_ready(self, kept: Sequence[Service]) -> None:
        """Wait until all answer 200 at their ready_url. Raises what ended one of them, or ServiceFailed."""
        await self.unless_failed(asyncio.gather(*(self._ready(service) for service in kept)))

    async def unless_failed(self, work: Awaitable[Any]) -> None:
        """Await `work`, unless a kept service fails for good first, whose error is raised."""
        working = asyncio.ensure_future(work)
        try:
            done, _ = await asyncio.wait({working, *self._keeping}, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {working}:
                task.result()
            await working
        finally:
            working.cancel()

    async def run_group(self, make: Callable[[], Sequence[Service]]) -> None:
        """Run services that belong together (the learner's ranks) until all exit with 0; a crash restarts them all."""
        crashes = 0
        while True:
            started, group = time.monotonic(), make()
            codes = await self._run_together(group)
            if not any(codes):
                return
            if EXIT_CONFIG in codes:
                self._check(group[0].name, EXIT_CONFIG)
            crashes = 1 if time.monotonic() - started > HEALTHY_S else crashes + 1
            await self._pause_after_crash(group[0].name, max(codes, key=abs), crashes)

    async def stop(self) -> None:
        """End everything: SIGTERM, then SIGKILL for what is left."""
        for task in self._keeping:
            task.cancel()
        await asyncio.gather(*self._keeping, return_exceptions=True)
        await asyncio.gather(*(self._end(name, process) for name, process in list(self._alive.items())))
        self._watchdog.close()

    async def _keep(self, service: Service) -> None:
        crashes = 0
        while True:
            started = time.monotonic()
            process = await self._spawn(service.name, service.command, service.environment)
            code = await self._ended(service.name, process)
            if code == EXIT_CONFIG:
                self._check(service.name, code)
            crashes = 1 if time.monotonic() - started > HEALTHY_S else crashes + 1
            await self._pause_after_crash(service.name, code, crashes)

    async def _pause_after_crash(self, name: str, code: int, crashes: int) -> None:
        if crashes >= MAX_CRASHES:
            raise ServiceFailed(f"{name} failed {crashes} times in a row: {self._last_line(name)}")
        pause_s = backoff_s(crashes)
        self._progress.say(f"{name} ended with {_meaning(code)}; starting it again in {pause_s:g} s")
        await asyncio.sleep(pause_s)

    async def _run_together(self, group: Sequence[Service]) -> list[int]:
        processes = [await self._spawn(s.name, s.command, s.environment) for s in group]
        waiting = {asyncio.create_task(self._ended(s.name, p)) for s, p in zip(group, processes, strict=True)}
        codes: list[int] = []
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            codes += [task.result() for task in done]
            if any(codes) and waiting:  # the other ranks would wait for the dead one
                await asyncio.gather(*(self._end(s.name, p) for s, p in zip(group, processes, strict=True)))
        return codes

    async def _spawn(
        self, name: str, command: Sequence[str], environment: dict[str, str] | Any, *, stdout: int | None = None
    ) -> asyncio.subprocess.Process:
        with (self._logs / f"{name}.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *command,
                env=dict(environment),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log if stdout is None else stdout,
                stderr=log,
                start_new_session=True,
            )
        self._watchdog.watch(process.pid)
        self._alive[name] = process
        return process

    async def _ended(self, name: str, process: asyncio.subprocess.Process) -> int:
        code = await process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what a crashed service left behind
        self._watchdog.forget(process.pid)
        if self._alive.get(name) is process:
            del self._alive[name]
        return code

    async def _end(self, name: str, process: asyncio.subprocess.Process) -> None:
        for number, wait_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), wait_s)
                break
        await self._ended(name, process)

    async def _ready(self, service: Service) -> None:
        deadline, reason = time.monotonic() + service.ready_s, "no answer"
        async with httpx.AsyncClient(timeout=5.0) as client:
            while time.monotonic() < deadline:
                with contextlib.suppress(httpx.TransportError):
                    answer = await client.get(service.ready_url)
                    if answer.is_success:
                        self._progress.say(f"{service.name} is ready")
                        return
                    reason = answer.text.strip()
                await asyncio.sleep(0.2)
        raise ServiceFailed(f"{service.name} was not ready within {service.ready_s:g} s: {reason}")

    def _check(self, name: str, code: int) -> None:
        if code == EXIT_CONFIG:
            raise ConfigError(self._last_line(name).removeprefix("multiattempt: error: "))
        if code:
            raise ServiceFailed(f"{name} ended with {_meaning(code)}: {self._last_line(name)}")

    def _last_line(self, name: str) -> str:
        path = self._logs / f"{name}.log"
        lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
        return f"{lines[-1][:500] if lines else 'it said nothing'} (log: {path})"


async def launch(config: RunConfig, *, resume: bool, command: str) -> int:
    """Run the experiment. Returns the exit code; `command` is what a user types to go on with it."""
    progress = Progress()
    interrupted = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, interrupted.set)
    running = asyncio.create_task(_experiment(config, progress, resume=resume))
    waiting = asyncio.create_task(interrupted.wait())
    await asyncio.wait({running, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if not running.done():
        progress.say("stopping")
        running.cancel()
    try:
        await running
    except asyncio.CancelledError:
        if has_checkpoints(config.run_dir):
            progress.say(f"stopped; to go on: {command.removesuffix(' --resume')} --resume")
        else:
            progress.say(f"stopped before the first checkpoint; to begin again: {command}")
        return EXIT_INTERRUPTED
    except ServiceFailed as error:
        progress.say(f"failed: {error}")
        return 1
    return 0


async def _experiment(config: RunConfig, progress: Progress, *, resume: bool) -> None:
    run_dir = config.run_dir
    if not resume:
        _clear(run_dir)
    supervisor = Supervisor(run_dir, progress)
    try:
        async with _ledger_store(config, supervisor, progress) as redis_url:
            resolved, ports = resolve(config, redis_url=redis_url)
            path = _write_resolved(resolved)
            await _learn(resolved, path, ports, supervisor, progress, resume=resume)
            await supervisor.stop()
    except BaseException:
        await supervisor.stop()
        raise


async def _learn(
    config: RunConfig, path: Path, ports: list[int], supervisor: Supervisor, progress: Progress, *, resume: bool
) -> None:
    """The experiment itself, in order: model, services, before, training, after, report."""
    environment = services.environment(config)

    async def evaluation(*arguments: str) -> None:
        command = services.one_shot("services.evaluation", path, *arguments)
        await supervisor.unless_failed(supervisor.run_once("evaluation", command, environment))

    await supervisor.run_once("prepare", services.one_shot("services.learner.prepare", path), environment)
    progress.say(f"starting the grader and {len(ports)} rollout replica{'s' if len(ports) > 1 else ''}")
    kept = [services.grader(config, path), *services.rollouts(config, path, ports)]
    for service in kept:
        supervisor.keep(service)
    await supervisor.until_ready(kept)
    if config.evaluation.enabled and not (run := config.run_dir / "evaluation" / "before.json").exists():
        if resume:
            progress.say(f"no {run}: the run was interrupted before its first evaluation")
        else:
            await evaluation("--label", "before")
    progress.say(f"training: {config.run.steps} steps of {config.learner.batch_dialogues} dialogues")
    following = asyncio.create_task(progress.follow(config.run_dir / "metrics.jsonl", steps=config.run.steps))
    try:
        master_port = free_port()
        await supervisor.unless_failed(
            supervisor.run_group(
                lambda: services.learners(config, path, master_port=master_port, resume=has_checkpoints(config.run_dir))
            )
        )
        await asyncio.sleep(1.0)  # the last step's line
    finally:
        following.cancel()
    if config.evaluation.enabled:
        await evaluation("--label", "after")
    await evaluation("--report")
    progress.say(f"done: metrics, checkpoints and plots are in {config.run_dir}")


@contextlib.asynccontextmanager
async def _ledger_store(config: RunConfig, supervisor: Supervisor, progress: Progress) -> AsyncIterator[str]:
    """URL of the Redis to use: the configured one, or an embedded Valkey that lives as long as the run."""
    if config.redis.url:
        yield config.redis.url
        return
    progress.say("starting an embedded Valkey")
    server = EmbeddedValkey(config.run_dir / "valkey")
    await asyncio.to_thread(server.start)
    assert server.pid is not None
    supervisor.watch(server.pid)
    try:
        yield server.url
    finally:
        await asyncio.to_thread(server.stop)


def resolve(config: RunConfig, *, redis_url: str) -> tuple[RunConfig, list[int]]:
    """Fill in what was left open: addresses, ports, the control token. Returns also each replica's port."""
    values = to_toml_dict(config)
    values["redis"]["url"] = redis_url
    values["grader"]["port"] = values["grader"]["port"] or free_port()
    host = values["grader"]["host"]
    values["grader"]["url"] = values["grader"]["url"] or f"http://{host}:{values['grader']['port']}"
    values["rollout"]["control_token"] = values["rollout"]["control_token"] or secrets.token_urlsafe(24)
    values["learner"]["metrics_port"] = values["learner"]["metrics_port"] or free_port()
    first = values["rollout"]["port"]
    ports = [first + i if first else free_port() for i in range(values["rollout"]["replicas"])]
    return RunConfig(**values), ports


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def backoff_s(crashes: int) -> float:
    """Pause before the start after `crashes` crashes in a row: 1, 2, 4, ... at most 30 s."""
    return min(FIRST_PAUSE_S * 2.0 ** (crashes - 1), LAST_PAUSE_S)


def _write_resolved(config: RunConfig) -> Path:
    """The one file that all services read. It holds the control token: nobody else may read it."""
    path = config.run_dir / "config.json"
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        json.dump(to_toml_dict(config), file, indent=1)
    return path


def _clear(run_dir: Path) -> None:
    """Forget an earlier start of this run that left no checkpoint."""
    for name in ("valkey", "evaluation", "logs", "tensorboard", "checkpoints"):
        shutil.rmtree(run_dir / name, ignore_errors=True)
    for name in ("metrics.jsonl", "model.json", "config.json"):
        (run_dir / name).unlink(missing_ok=True)
    run_dir.mkdir(parents=True, exist_ok=True)


def _meaning(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
