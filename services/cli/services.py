"""What each process of a run is started with: command, environment, how to see that it is ready."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from services.contracts.config import RunConfig

GRADER_READY_S = 60.0
ROLLOUT_READY_S = 600.0  # a large model on a slow disk
# libgomp's default spinning collapses under any competitor on the same cores (platform measurements: a twelfth).
ENVIRONMENT = {
    "GOMP_SPINCOUNT": "10000",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}


@dataclass(frozen=True, slots=True)
class Service:
    """One process that is kept alive."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    ready_url: str = ""  # empty: not waited for
    ready_s: float = 0.0


def environment(config: RunConfig, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The launcher's own environment with what every service needs. Offline unless the run uses a hub."""
    merged = {**ENVIRONMENT, **os.environ, **(extra or {})}
    if not uses_hub(config):
        merged["HF_HUB_OFFLINE"] = "1"
    return merged


def uses_hub(config: RunConfig) -> bool:
    """Whether the model or the data may have to come from the Hugging Face hub."""
    local_model = config.model.source != "pretrained" or Path(config.model.path).expanduser().exists()
    return config.data.source == "hub" or not local_model


def one_shot(module: str, config_path: Path, *arguments: str) -> tuple[str, ...]:
    """Command of a process that runs to its end."""
    return (sys.executable, "-m", module, "--config", str(config_path), *arguments)


def grader(config: RunConfig, config_path: Path) -> Service:
    """The grader."""
    return Service(
        "grader",
        one_shot("services.grader", config_path),
        environment(config),
        ready_url=f"{config.grader.url}/readyz",
        ready_s=GRADER_READY_S,
    )


def rollouts(config: RunConfig, config_path: Path, ports: list[int]) -> list[Service]:
    """The replicas, each on its own port and, where there are GPUs, on its own GPU."""
    return [
        Service(
            f"rollout-{i}",
            one_shot("services.rollout", config_path, "--replica-id", f"rollout-{i}", "--port", str(port)),
            environment(config),
            ready_url=f"http://{config.rollout.host}:{port}/readyz",
            ready_s=ROLLOUT_READY_S,
        )
        for i, port in enumerate(ports)
    ]


def learners(config: RunConfig, config_path: Path, *, master_port: int, resume: bool) -> list[Service]:
    """The learner's ranks; more than one meet at `master_port`."""
    size = config.learner.processes
    arguments = ("--resume",) if resume else ()
    return [
        Service(
            "learner" if size == 1 else f"learner-{rank}",
            one_shot("services.learner", config_path, *arguments),
            environment(
                config,
                {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(size),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(master_port),
                },
            ),
        )
        for rank in range(size)
    ]
