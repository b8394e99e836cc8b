"""Everything that can be known to be wrong before anything starts. Each mistake is a ConfigError of one line."""

import asyncio
import shutil
import socket
from pathlib import Path

from services.contracts.config import ConfigError, RunConfig
from services.contracts.ledger import run_prefix
from services.contracts.problems import load_problems
from services.contracts.store import connect
from services.evaluation.benchmarks import load as load_benchmark
from services.evaluation.contamination import overlaps, report
from services.learner.algorithm import check_unchanged
from services.learner.checkpoint import Checkpoints
from services.rollout.environment import load_environment

MIN_MEMORY_GB = 3.0  # engine, learner and grader of the smallest model, measured
MIN_SERVING_GB = 1.5  # the same without the learner
MIN_DISK_GB = 1.0
REPLICA_GB = 1.0  # each further engine process before its weights
# Copies of the weights file: one in each replica, and in the learner actor, critic, reference, their gradients and
# AdamW's two moments. Low on purpose: it stops only what cannot work.
LEARNER_COPIES = 6
CGROUP = Path("/sys/fs/cgroup")


def check(config: RunConfig, *, resume: bool, accept_changes: bool = False) -> None:
    """Raise ConfigError for the first thing that would make the run fail."""
    _check_run_folder(config, resume=resume)
    if resume and not accept_changes and (newest := Checkpoints(config.run_dir / "checkpoints", keep=1).latest()):
        check_unchanged(newest[0], config)
    check_inputs(config)
    check_memory(config, available_gb=available_memory_gb())
    _check_ports(config)
    if config.redis.url:
        asyncio.run(_check_redis(config, resume=resume))


def check_inputs(config: RunConfig) -> None:
    """Raise ConfigError for the first thing wrong with what the run reads, or with the place it writes to."""
    check_disk(config.run_dir)
    _check_model(config)
    load_environment(config.dialogue)
    load_problems(config)
    measured = config.evaluation.sets if config.evaluation.every else ()
    for name in dict.fromkeys((*config.evaluation.benchmarks, *measured)):
        load_benchmark(name, folder=benchmarks_folder(config), config=config)


def benchmarks_folder(config: RunConfig) -> Path | None:
    """Where the files of `evaluation.benchmarks` are; None: on the hub."""
    return config.evaluation.benchmarks_folder if config.evaluation.benchmarks_folder != Path("") else None


def contamination(config: RunConfig) -> list[str]:
    """Lines that say how many problems of `evaluation.benchmarks` are among those that are trained on."""
    folder = benchmarks_folder(config)
    sets = [load_benchmark(name, folder=folder, config=config) for name in config.evaluation.benchmarks]
    train = load_problems(config).train
    return report(overlaps(train, {one.name: one.problems for one in sets}), num_train=len(train))


def has_checkpoints(run_dir: Path) -> bool:
    """Whether the run has something to go on from."""
    folder = run_dir / "checkpoints"
    return folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir())


def available_memory_gb(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = CGROUP) -> float:
    """What new processes can use without swapping: the machine's, or the container's where that is less."""
    fields = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines() if ":" in line)
    available = int(fields["MemAvailable"].split()[0]) / 2**20
    try:
        limit = (cgroup / "memory.max").read_text(encoding="ascii").strip()
        used = int((cgroup / "memory.current").read_text(encoding="ascii"))
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text(encoding="ascii").splitlines())
    except OSError:
        return available  # no limit of ours to see
    if limit == "max":
        return available
    return min(available, (int(limit) - used + int(stat.get("inactive_file", 0))) / 2**30)


def check_memory(config: RunConfig, *, available_gb: float, has_learner: bool = True) -> None:
    """Raise ConfigError when the run cannot fit into the host's memory; without a learner it is only generated."""
    needed_gb = (MIN_MEMORY_GB if has_learner else MIN_SERVING_GB) + (config.rollout.replicas - 1) * REPLICA_GB
    devices = (config.rollout.device, config.learner.device) if has_learner else (config.rollout.device,)
    on_gpu = any(Path("/dev").glob("nvidia[0-9]*")) and "cpu" not in devices
    if not on_gpu:
        needed_gb += config.rollout.replicas * config.rollout.kv_cache_mb / 1024
        needed_gb += _weights_gb(config) * (config.rollout.replicas + (LEARNER_COPIES if has_learner else 0))
    if available_gb < needed_gb:
        raise ConfigError(
            f"memory: {available_gb:.1f} GB available, about {needed_gb:.1f} GB are needed; close other programs, "
            f"or choose a smaller model.path, rollout.replicas or rollout.kv_cache_mb"
        )


def _weights_gb(config: RunConfig) -> float:
    folder = Path(config.model.path).expanduser()
    if config.model.source != "pretrained" or not folder.is_dir():
        return 0.0
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**30


def _check_run_folder(config: RunConfig, *, resume: bool) -> None:
    started = has_checkpoints(config.run_dir)
    if started and not resume:
        raise ConfigError(
            f"run.name: {config.run_dir} has checkpoints of an earlier run; add --resume to go on with it, "
            f"or choose another --run.name"
        )
    if resume and not started:
        raise ConfigError(f"--resume: there is no checkpoint under {config.run_dir}; leave --resume out to begin")


def check_disk(folder: Path, *, setting: str = "run.dir") -> None:
    """Raise ConfigError when there is no room for what is written to `folder`, which need not exist yet."""
    existing = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())
    if not existing.is_dir():
        raise ConfigError(f"{setting}: {existing} is a file; choose a folder")
    free_gb = shutil.disk_usage(existing).free / 2**30
    if free_gb < MIN_DISK_GB:
        raise ConfigError(f"{setting}: {free_gb:.1f} GB free at {existing}, at least {MIN_DISK_GB:g} GB are needed")


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


def _check_ports(config: RunConfig) -> None:
    grader, rollout, learner = config.grader, config.rollout, config.learner
    wanted = [] if grader.url or not grader.port else [("grader.port", grader.host, grader.port)]
    if rollout.port:
        wanted += [("rollout.port", rollout.host, rollout.port + i) for i in range(rollout.replicas)]
    if learner.metrics_port:
        wanted.append(("learner.metrics_port", "127.0.0.1", learner.metrics_port))
    taken: dict[int, str] = {}
    for name, host, port in wanted:
        if port > 65535:
            raise ConfigError(f"{name}: {port} is no port; with {rollout.replicas} replicas begin lower")
        if port in taken:
            raise ConfigError(f"{name}: {port} is also {taken[port]}; choose another, or 0 for any")
        taken[port] = name
        _check_port(name, host, port)


def _check_port(name: str, host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"{name}: {host}:{port}: {error.strerror}; choose another, or 0 for any") from error


async def _check_redis(config: RunConfig, *, resume: bool) -> None:
    """It answers, and a new run would not find the ledger of an earlier one of its name: it would train on that."""
    client = await connect(config.redis.url, start_patience_s=2.0)
    try:
        has_ledger = not resume and await client.exists(f"{run_prefix(config.run.name)}next_task")
    finally:
        await client.aclose()
    if has_ledger:
        raise ConfigError(
            f"run.name: the Redis at redis.url holds the ledger of an earlier run {config.run.name!r}; "
            f"choose another --run.name, or delete its keys ({run_prefix(config.run.name)}*)"
        )
