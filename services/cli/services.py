"""What each process of a run is started with: command, environment, how to see that it is ready."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.contracts.config import RunConfig

GRADER_READY_S = 60.0
ROLLOUT_READY_S = 600.0  # a large model on a slow disk
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}
# libgomp's default spinning collapses under any competitor on the same cores (platform measurements: a twelfth).
# Not for the learner: it chooses by its staleness, and this variable would overrule its OMP_WAIT_POLICY.
SPIN_SHORTLY = {"GOMP_SPINCOUNT": "10000"}

Programs = Mapping[str, tuple[str, ...]]
PROGRAMS: Programs = {
    "prepare": (sys.executable, "-m", "services.learner.prepare"),
    "grader": (sys.executable, "-m", "services.grader"),
    "rollout": (sys.executable, "-m", "services.rollout"),
    "learner": (sys.executable, "-m", "services.learner"),
    "evaluation": (sys.executable, "-m", "services.evaluation"),
}


@dataclass(frozen=True, slots=True)
class Service:
    """One process."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    ready_url: str = ""  # empty: not waited for
    ready_s: float = 0.0


class Plan:
    """The services of one run. config: resolved; path: its file; programs: what starts each kind of process.

    accept_changes: the learner may go on from a checkpoint of another algorithm.
    """

    def __init__(
        self, config: RunConfig, path: Path, programs: Programs = PROGRAMS, *, accept_changes: bool = False
    ) -> None:
        self._config, self._path, self._programs = config, path, programs
        self._accept_changes = accept_changes

    def one_shot(self, program: str, *arguments: str) -> Service:
        """A process that runs to its end."""
        return Service(program, self._command(program, *arguments), environment(self._config, defaults=SPIN_SHORTLY))

    def grader(self) -> Service:
        """The grader."""
        return Service(
            "grader",
            self._command("grader"),
            environment(self._config),
            ready_url=f"{self._config.grader.url}/readyz",
            ready_s=GRADER_READY_S,
        )

    def rollouts(self, ports: Sequence[int]) -> list[Service]:
        """The replicas, each on its own port and, as far as there are enough, on its own GPUs."""
        rollout = self._config.rollout
        devices = replica_gpus(
            visible_gpus() if rollout.device != "cpu" else (),
            num_learners=self._config.learner.processes if self._config.learner.device != "cpu" else 0,
            num_replicas=len(ports),
            per_replica=rollout.tensor_parallel_size,
        )
        return [
            Service(
                f"rollout-{i}",
                self._command("rollout", "--replica-id", f"rollout-{i}", "--port", str(port)),
                environment(
                    self._config,
                    defaults=SPIN_SHORTLY,
                    assigned={"CUDA_VISIBLE_DEVICES": gpus} if gpus else {},
                ),
                ready_url=f"http://{rollout.host}:{port}/readyz",
                ready_s=ROLLOUT_READY_S,
            )
            for i, (port, gpus) in enumerate(zip(ports, devices, strict=True))
        ]

    def learners(self, *, master_port: int, resume: bool) -> list[Service]:
        """The learner's ranks; more than one meet at `master_port`."""
        size = self._config.learner.processes
        flags = (*(("--resume",) if resume else ()), *(("--accept-changes",) if self._accept_changes else ()))
        meeting = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(master_port)}
        return [
            Service(
                "learner" if size == 1 else f"learner-{rank}",
                self._command("learner", *flags),
                environment(self._config, assigned={"RANK": str(rank), "LOCAL_RANK": str(rank), **meeting}),
            )
            for rank in range(size)
        ]

    def _command(self, program: str, *arguments: str) -> tuple[str, ...]:
        return (*self._programs[program], "--config", str(self._path), *arguments)


def environment(
    config: RunConfig, *, defaults: Mapping[str, str] | None = None, assigned: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Defaults, then what the user exported, then what the launcher assigns. Offline unless the run uses a hub."""
    merged = {**ENVIRONMENT, **(defaults or {}), **os.environ, **(assigned or {})}
    if not uses_hub(config):
        merged["HF_HUB_OFFLINE"] = "1"
    return merged


def uses_hub(config: RunConfig) -> bool:
    """Whether the model or the data may have to come from the Hugging Face hub."""
    local_model = config.model.source != "pretrained" or Path(config.model.path).expanduser().exists()
    return config.data.source == "hub" or not local_model


def visible_gpus() -> tuple[str, ...]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; no driver is loaded to find out."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return tuple(name.strip() for name in named.split(",") if name.strip() not in ("", "-1"))
    return tuple(str(i) for i in range(len(list(Path("/dev").glob("nvidia[0-9]*")))))


def replica_gpus(gpus: Sequence[str], *, num_learners: int, num_replicas: int, per_replica: int) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each replica: those after the learner's ranks, and around again when there are too few.

    An empty text where there is no GPU.
    """
    if not gpus:
        return [""] * num_replicas
    firsts = range(num_learners, num_learners + num_replicas * per_replica, per_replica)
    return [",".join(gpus[(first + i) % len(gpus)] for i in range(per_replica)) for first in firsts]
