"""What a step was like: figures out of its trajectories, and where all figures go.

metrics.jsonl has one line per step; TensorBoard, Prometheus and, where asked for, Weights & Biases get the same.
"""

import contextlib
import errno
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from prometheus_client import Gauge
from torch.utils.tensorboard import SummaryWriter

from services.contracts.config import ConfigError, RunConfig
from services.contracts.rewards import attempt_reward
from services.contracts.wire import Trajectory, Verdict
from services.learner.exported import export
from services.learner.mismatch import staleness

STEP_AT = Gauge("multiattempt_learner_step_finished_timestamp_seconds", "When the newest step was done, Unix time")


log = logging.getLogger(__name__)


def summarise(trajectories: Sequence[Trajectory], *, version: int) -> dict[str, float]:
    """Figures of one batch trained from weights `version`. Shares are of dialogues unless they say attempts.

    accuracy_first / accuracy_last: first / last attempt correct. staleness_mean, _max: updates between the oldest
    weights in a dialogue and `version`; staleness_k: share of tokens. generate_s, grade_s: mean seconds of one
    dialogue spent so. reward_of_n: mean reward of dialogues that were allowed n attempts. accuracy_attempt_k,
    reward_attempt_k: of the k-th attempts made, share correct and mean of what each would earn by itself.
    """
    verdicts = [[attempt.verdict for attempt in t.attempts] for t in trajectories]
    attempts = [verdict for dialogue in verdicts for verdict in dialogue]
    ages = np.array([version - t.oldest_version for t in trajectories])
    tokens = np.array([int(t.action_mask.sum()) for t in trajectories])
    return {
        "dialogues": float(len(trajectories)),
        "reward": float(np.mean([t.reward for t in trajectories])),
        "accuracy_first": float(np.mean([bool(v) and v[0] is Verdict.CORRECT for v in verdicts])),
        "accuracy_last": float(np.mean([t.is_solved for t in trajectories])),
        "attempts_mean": float(np.mean([len(v) for v in verdicts])),
        "no_answer": attempts.count(Verdict.NO_ANSWER) / max(1, len(attempts)),
        "timeouts": float(attempts.count(Verdict.TIMEOUT)),
        "truncated": float(np.mean([t.finish_reason == "length" for t in trajectories])),
        "response_tokens": float(tokens.mean()),
        "response_tokens_max": float(tokens.max()),
        "total_tokens": float(np.mean([len(t.token_ids) for t in trajectories])),
        "generate_s": float(np.mean([t.timings.generate_s for t in trajectories])),
        "grade_s": float(np.mean([t.timings.grade_s for t in trajectories])),
        "staleness_mean": float(ages.mean()),
        "staleness_max": float(ages.max()),
        "mixed_versions": float(np.mean([len({s.version for s in t.versions}) > 1 for t in trajectories])),
        **staleness(trajectories, version=version),
        **_by_allowed(trajectories),
        **_by_attempt(verdicts),
    }


def _by_allowed(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    allowed: dict[int, list[float]] = {}
    for trajectory in trajectories:
        allowed.setdefault(trajectory.max_attempts, []).append(trajectory.reward)
    return {f"reward_of_{n}": float(np.mean(rewards)) for n, rewards in sorted(allowed.items())}


def _by_attempt(verdicts: Sequence[Sequence[Verdict]]) -> dict[str, float]:
    found = {}
    for k in range(max(map(len, verdicts), default=0)):
        made = [dialogue[k] for dialogue in verdicts if len(dialogue) > k]
        found[f"accuracy_attempt_{k + 1}"] = made.count(Verdict.CORRECT) / len(made)
        found[f"reward_attempt_{k + 1}"] = float(np.mean([attempt_reward(verdict) for verdict in made]))
    return found


class Sink(Protocol):
    """Where figures go beside the files."""

    def log(self, figures: Mapping[str, float], *, step: int) -> object:
        """Take the figures of one step."""

    def finish(self) -> object:
        """Hand over what is left."""


def weights_and_biases(config: RunConfig) -> Sink | None:
    """The run's page in the project `learner.wandb_project`; None when that is empty. Raises ConfigError.

    A run that is resumed goes on with its page; steps done again are kept as they were. Addresses and tokens stay here.
    """
    if not config.learner.wandb_project:
        return None
    told = {"run", "model", "data", "dialogue", "sampling", "learner"}
    page: Any = _import_wandb().init(
        project=config.learner.wandb_project,
        id=config.run.name,
        name=config.run.name,
        resume="allow",
        dir=str(config.run_dir),
        config=config.model_dump(mode="json", include=told),
    )
    sink: Sink = page
    return sink


def _import_wandb() -> ModuleType:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            "learner.wandb_project: wandb is not installed; pip install wandb, or leave it empty"
        ) from error
    module: ModuleType = wandb
    return module


class Metrics:
    """Writes the figures of each step below `folder`. version: of the weights the run continues from.

    Lines and events after that version are forgotten: the steps will be done again.
    """

    def __init__(self, folder: Path, *, version: int, sinks: Sequence[Sink] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "metrics.jsonl"
        _forget_after(self._path, version)
        self._board_folder = str(folder / "tensorboard")
        self._board: SummaryWriter | None = SummaryWriter(self._board_folder, purge_step=version + 1)
        self._sinks = tuple(sinks)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Append one step. A figure that is not finite becomes null.

        Raises OSError when the disk refuses; then nothing was written, and it may be tried again.
        """
        line: dict[str, float | None] = {"step": step, "version": step}
        line |= {name: _rounded(value) if math.isfinite(value) else None for name, value in figures.items()}
        _append(self._path, json.dumps(line) + "\n")
        self._draw(step, figures)
        export({"version": step, **figures})
        STEP_AT.set_to_current_time()
        for sink in self._sinks:
            sink.log(dict(figures), step=step)

    def _draw(self, step: int, figures: Mapping[str, float]) -> None:
        """For TensorBoard, which is only looked at: what the disk refuses is missing there, and training goes on."""
        try:
            if self._board is None:
                self._board = SummaryWriter(self._board_folder)
            for name, value in figures.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        except OSError as error:
            log.warning("TensorBoard lacks a step", extra={"step": step, "error": str(error)})
            self._board = None  # its thread has ended

    def close(self) -> None:
        """Flush and close."""
        if self._board is not None:
            with contextlib.suppress(OSError):
                self._board.close()
        for sink in self._sinks:
            sink.finish()


def _append(path: Path, line: str) -> None:
    """All of the line, or nothing and OSError."""
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            file.write(line.encode())
            if file.tell() < size + len(line.encode()):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(size)
            raise


def _rounded(value: float) -> float:
    return float(f"{value:.7g}")


def _forget_after(path: Path, version: int) -> None:
    """Cut the file before the first line of a later version (or one that a crash cut short)."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        position = 0
        for line in file:
            try:
                later = not line.endswith(b"\n") or json.loads(line)["version"] > version
            except (json.JSONDecodeError, KeyError, TypeError):
                later = True
            if later:
                break
            position += len(line)
        file.truncate(position)
