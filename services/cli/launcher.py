"""One run on this machine, in order: store, model, services, evaluation, training, evaluation, report.

How processes are kept alive and stopped is `supervisor`'s; with which commands they start, `services`'.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from services.cli.preflight import contamination, has_checkpoints
from services.cli.progress import Progress
from services.cli.services import PROGRAMS, Plan, Programs
from services.cli.store import EmbeddedStore
from services.cli.supervisor import ServiceFailed, Supervisor
from services.contracts.config import ConfigError, RunConfig, to_toml_dict
from services.contracts.ports import free_port

LOOK_S = 2.0  # for what troubles the learner
STARTING = "starting"  # what it says itself before its first update
EXIT_BY_SIGNAL = 128  # plus the signal's number, as shells have it: 130 for Ctrl-C, 143 for SIGTERM


async def launch(
    config: RunConfig, *, resume: bool, command: str, accept_changes: bool = False, programs: Programs = PROGRAMS
) -> int:
    """Run the experiment. Returns the exit code; `command` is what a user types to go on with it.

    Raises ConfigError, with everything stopped, when a service finds its configuration wrong.
    """
    with _only_launcher(config.run_dir), Progress() as progress:
        if not resume:
            _clear(config.run_dir)
        supervisor = Supervisor(config.run_dir / "logs", progress, milestone=lambda: _newest_checkpoint(config.run_dir))
        store = EmbeddedStore(config.run_dir / "valkey", supervisor, progress)
        running = asyncio.create_task(
            _experiment(
                config, supervisor, store, progress, resume=resume, accept_changes=accept_changes, programs=programs
            )
        )
        received = stop_on_signals(running, supervisor, progress, told="the learner saves what it has")
        try:
            return await _outcome(running, config, progress, command=command, received=received)
        finally:
            progress.doing("stopping")
            await supervisor.stop()
            await store.stop()
            supervisor.close()


async def _outcome(
    running: "asyncio.Task[None]", config: RunConfig, progress: Progress, *, command: str, received: list[int]
) -> int:
    try:
        await running
    except asyncio.CancelledError:
        code, end = EXIT_BY_SIGNAL + (received or [signal.SIGINT])[0], "stopped"
    except ServiceFailed as error:
        code, end = 1, f"failed: {error}"
    else:
        return 0
    command = command.removesuffix(" --resume")
    progress.at_end(
        lambda: (
            f"{end}; to go on: {command} --resume"
            if has_checkpoints(config.run_dir)
            else f"{end}; there is no checkpoint yet; to begin again: {command}"
        )
    )
    return code


def stop_on_signals(
    running: "asyncio.Task[Any]", supervisor: Supervisor, progress: Progress, *, told: str
) -> list[int]:
    """The first signal stops cleanly, a second one at once. Returns the list that received ones are added to."""
    received: list[int] = []

    def stop(number: int) -> None:
        received.append(number)
        if len(received) > 1:
            supervisor.kill()
        else:
            progress.say(f"stopping: {told} (again to stop at once)")
            running.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            asyncio.get_running_loop().add_signal_handler(number, stop, number)
    return received


async def _experiment(
    config: RunConfig,
    supervisor: Supervisor,
    store: EmbeddedStore,
    progress: Progress,
    *,
    resume: bool,
    accept_changes: bool,
    programs: Programs,
) -> None:
    if config.evaluation.benchmarks:
        for line in await asyncio.to_thread(contamination, config):
            progress.say(line)
    url = config.redis.url
    if not url:
        progress.doing("starting an embedded Valkey")
        url = await store.start()
    resolved, ports = resolve(config, redis_url=url)
    plan = Plan(resolved, write_resolved(resolved), programs, accept_changes=accept_changes)

    async def once(name: str, *arguments: str) -> None:
        one_shot = plan.one_shot(name, *arguments)
        await supervisor.unless_failed(supervisor.run_once(name, one_shot.command, one_shot.environment))

    progress.doing("preparing the model")
    await once("prepare")
    kept = [*([] if config.grader.url else [plan.grader()]), *plan.rollouts(ports)]
    progress.doing(f"starting {', '.join(service.name for service in kept)}")
    for service in kept:
        supervisor.keep(service)
    await supervisor.until_ready(kept)
    if config.evaluation.enabled and not (resume and (config.run_dir / "evaluation" / "before.json").exists()):
        progress.doing("evaluating before training")
        await once("evaluation", "--label", "before")
    await _train(resolved, plan, supervisor, progress)
    if config.evaluation.enabled:
        progress.doing("evaluating after training")
        await once("evaluation", "--label", "after")
    await once("evaluation", "--report")
    done = f"done: metrics, checkpoints and plots are in {config.run_dir}{_newest_checkpoint(config.run_dir)}"
    progress.at_end(lambda: done)


async def _train(config: RunConfig, plan: Plan, supervisor: Supervisor, progress: Progress) -> None:
    progress.doing(f"training: {config.run.steps} steps of {config.learner.batch_dialogues} dialogues")
    watching = [
        asyncio.create_task(progress.follow(config.run_dir / "metrics.jsonl", steps=config.run.steps)),
        asyncio.create_task(_tell_trouble(config, progress)),
    ]
    try:
        await supervisor.unless_failed(
            supervisor.run_group(lambda: plan.learners(master_port=free_port(), resume=has_checkpoints(config.run_dir)))
        )
    finally:
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)


async def _tell_trouble(config: RunConfig, progress: Progress) -> None:
    """Say why the learner makes no progress, and when it does again, until cancelled."""
    host = config.learner.metrics_host.replace("0.0.0.0", "127.0.0.1")
    url, told = f"http://{host}:{config.learner.metrics_port}/readyz", ""
    async with httpx.AsyncClient(timeout=5.0, trust_env=False) as client:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                answer = await client.get(url)
            except httpx.TransportError:  # it is being started
                continue
            trouble = "" if answer.is_success else str(answer.json().get("detail", ""))
            if trouble != told and STARTING not in (trouble, told):
                progress.say(f"learner: {trouble or 'goes on'}")
            told = trouble


@contextlib.contextmanager
def _only_launcher(run_dir: Path) -> Iterator[None]:
    """Hold the run. Raises ConfigError while another launcher does; the kernel lets go of it however that one ends."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"run.name: another multiattempt is running {run_dir}; stop it, or choose another --run.name"
            ) from error
        yield


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


def _newest_checkpoint(run_dir: Path) -> str:
    """For the last line: the newest checkpoint, whose names sort by version."""
    folder = run_dir / "checkpoints"
    names = sorted(path.name for path in folder.glob("[!.]*")) if folder.is_dir() else []
    return f"; the newest checkpoint is {folder / names[-1]}" if names else ""


def write_resolved(config: RunConfig) -> Path:
    """The one file that all services read. It holds the control token: nobody else may read it."""
    path = config.run_dir / "config.json"
    partial = path.with_name(f".{path.name}.{os.getpid()}")  # a service may be reading the old one
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        json.dump(to_toml_dict(config), file, indent=1)
    os.replace(partial, path)
    return path


def _clear(run_dir: Path) -> None:
    """Forget an earlier start of this run that left no checkpoint."""
    for name in ("valkey", "evaluation", "logs", "tensorboard", "checkpoints", "dialogues"):
        shutil.rmtree(run_dir / name, ignore_errors=True)
    for name in ("metrics.jsonl", "model.json", "config.json"):
        (run_dir / name).unlink(missing_ok=True)
