"""A step's figures as Prometheus metrics: the same numbers as in metrics.jsonl, with units in their names.

The names are made by rule (`metric_of`), so a figure that is added to a step is exported too.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from prometheus_client import Gauge

PREFIX = "multiattempt_learner_"

# Figures whose unit their name does not say; "" has none.
_UNITS = {
    "reward": "", "return_mean": "", "advantage_std": "", "attempts_mean": "", "value_loss": "", "policy_loss": "",
    "lr": "", "critic_lr": "", "kl_coef": "", "grad_norm": "", "critic_grad_norm": "", "grad_norm_max": "",
    "critic_grad_norm_max": "", "importance_mean": "", "version": "",
    "accuracy_first": "ratio", "accuracy_last": "ratio", "dev_accuracy": "ratio", "dev_accuracy_first": "ratio",
    "no_answer": "ratio", "truncated": "ratio",
    "mixed_versions": "ratio", "explained_variance": "ratio", "clip_fraction": "ratio",
    "value_clip_fraction": "ratio", "importance_ess": "ratio",
    "entropy": "nats", "kl_behaviour": "nats", "kl_old": "nats", "kl_ref": "nats", "mismatch_mean": "nats",
    "mismatch_max": "nats",
    "staleness_mean": "versions", "staleness_max": "versions",
    "dialogues": "", "response_tokens": "", "response_tokens_max": "", "total_tokens": "", "action_tokens": "",
    "timeouts": "attempts", "issued": "tasks", "dropped": "dialogues", "dropped_stale": "dialogues",
    "masked_dialogues": "", "nonfinite_steps": "", "replicas": "", "replicas_dropped": "",
    "queue_waiting": "tasks", "queue_running": "tasks", "queue_trajectories_ready": "", "queue_dead": "tasks",
}  # fmt: skip
_FAMILIES = (
    (re.compile(r"accuracy_attempt_(\d+)"), "attempt_accuracy_ratio", "attempt"),
    (re.compile(r"reward_attempt_(\d+)"), "attempt_reward", "attempt"),
    (re.compile(r"reward_of_(\d+)"), "allowed_reward", "allowed"),
    (re.compile(r"staleness_(\d+)"), "token_staleness_ratio", "versions"),
    (re.compile(r"publish_(\w+)_s"), "publish_phase_seconds", "phase"),
)

_gauges: dict[str, Gauge] = {}


class Metric(NamedTuple):
    """Where a figure goes."""

    name: str
    labels: Mapping[str, str]


def metric_of(figure: str) -> Metric:
    """The metric of a figure: its own, or a member of a family."""
    for pattern, name, label in _FAMILIES:
        if match := pattern.fullmatch(figure):
            return Metric(PREFIX + name, {label: match[1]})
    if figure.endswith("_per_s"):
        return Metric(f"{PREFIX}{figure[:-6]}_per_second", {})
    if figure.endswith("_s"):
        return Metric(f"{PREFIX}{figure[:-2]}_seconds", {})
    unit = _UNITS.get(figure, "")
    return Metric(f"{PREFIX}{figure}_{unit}" if unit else PREFIX + figure, {})


def export(figures: Mapping[str, float]) -> None:
    """Set the metrics of a step."""
    for figure, value in figures.items():
        name, labels = metric_of(figure)
        if name not in _gauges:
            told = f"by {', '.join(labels)}" if labels else f"{figure} of metrics.jsonl"
            _gauges[name] = Gauge(name, f"Of the newest step: {told}", list(labels))
        (_gauges[name].labels(**labels) if labels else _gauges[name]).set(value)
