"""Everything that can be known to be wrong before anything starts. Each mistake is a ConfigError of one line."""

import asyncio
import shutil
import socket
from pathlib import Path

from services.contracts.config import ConfigError, RunConfig
from services.contracts.problems import load_problems
from services.contracts.store import connect

MIN_MEMORY_GB = 3.0  # engine, learner and grader of the smallest model, measured
MIN_DISK_GB = 1.0


def check(config: RunConfig, *, resume: bool) -> None:
    """Raise ConfigError for the first thing that would make the run fail."""
    _check_run_folder(config, resume=resume)
    _check_memory()
    _check_disk(config.run_dir)
    _check_model(config)
    load_problems(config)
    for name, host, port in (
        ("grader.port", config.grader.host, config.grader.port),
        ("rollout.port", config.rollout.host, config.rollout.port),
        ("learner.metrics_port", "127.0.0.1", config.learner.metrics_port),
    ):
        if port:
            _check_port(name, host, port)
    if config.redis.url:
        asyncio.run(_check_redis(config.redis.url))


def has_checkpoints(run_dir: Path) -> bool:
    """Whether the run has something to go on from."""
    folder = run_dir / "checkpoints"
    return folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir())


def _check_run_folder(config: RunConfig, *, resume: bool) -> None:
    started = has_checkpoints(config.run_dir)
    if started and not resume:
        raise ConfigError(
            f"run.name: {config.run_dir} has checkpoints of an earlier run; add --resume to go on with it, "
            f"or choose another --run.name"
        )
    if resume and not started:
        raise ConfigError(f"--resume: there is no checkpoint under {config.run_dir}; leave --resume out to begin")


def _check_memory() -> None:
    available_gb = _available_memory_gb()
    if available_gb < MIN_MEMORY_GB:
        raise ConfigError(
            f"memory: {available_gb:.1f} GB available, at least {MIN_MEMORY_GB:g} GB are needed; close other programs"
        )


def _available_memory_gb() -> float:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 2**20
    raise ConfigError("memory: /proc/meminfo does not say how much is available")


def _check_disk(folder: Path) -> None:
    existing = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())
    free_gb = shutil.disk_usage(existing).free / 2**30
    if free_gb < MIN_DISK_GB:
        raise ConfigError(f"run.dir: {free_gb:.1f} GB free at {existing}, at least {MIN_DISK_GB:g} GB are needed")


def _check_model(config: RunConfig) -> None:
    path = config.model.path
    if config.model.source != "pretrained":
        return
    if not path:
        raise ConfigError("model.path: empty; name a local folder or a Hugging Face model, or set model.source")
    folder = Path(path).expanduser()
    looks_local = folder.is_absolute() or path.startswith(".") or folder.exists()
    if looks_local and not (folder / "config.json").is_file():
        raise ConfigError(f"model.path: {path}: no config.json there; not a Hugging Face model folder")


def _check_port(name: str, host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"{name}: {host}:{port}: {error.strerror}; choose another, or 0 for any") from error


async def _check_redis(url: str) -> None:
    client = await connect(url, start_patience_s=2.0)
    await client.aclose()
