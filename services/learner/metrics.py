"""What a step was like: figures out of its trajectories, and where all figures go.

metrics.jsonl has one line per step; TensorBoard and Prometheus get the same numbers.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from prometheus_client import Gauge
from torch.utils.tensorboard import SummaryWriter

from services.contracts.wire import Trajectory, Verdict

_VALUE = Gauge("multiattempt_learner_value", "Newest value of each figure in metrics.jsonl", ["name"])


def summarise(trajectories: Sequence[Trajectory], *, version: int) -> dict[str, float]:
    """Figures of one batch trained from weights `version`. Shares are of dialogues unless they say attempts.

    accuracy_first / accuracy_last: first / last attempt correct. staleness: updates between the oldest weights in a
    dialogue and `version`. generate_s, grade_s: mean seconds of one dialogue spent so.
    """
    verdicts = [[attempt.verdict for attempt in t.attempts] for t in trajectories]
    attempts = [verdict for dialogue in verdicts for verdict in dialogue]
    staleness = np.array([version - t.oldest_version for t in trajectories])
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
        "staleness_mean": float(staleness.mean()),
        "staleness_max": float(staleness.max()),
        "mixed_versions": float(np.mean([len({s.version for s in t.versions}) > 1 for t in trajectories])),
    }


class Metrics:
    """Writes the figures of each step below `folder`. version: of the weights the run continues from.

    Lines and events after that version are forgotten: the steps will be done again.
    """

    def __init__(self, folder: Path, *, version: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "metrics.jsonl"
        _forget_after(self._path, version)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=version + 1)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Append one step. A figure that is not finite becomes null."""
        line: dict[str, float | None] = {"step": step, "version": step}
        line |= {name: _rounded(value) if math.isfinite(value) else None for name, value in figures.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in figures.items():
            self._board.add_scalar(name, value, step)
            _VALUE.labels(name).set(value)
        _VALUE.labels("version").set(step)
        self._board.flush()

    def close(self) -> None:
        """Flush and close."""
        self._board.close()


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
