"""A replica's vital signs for `multiattempt status` and the console: rates and idle shares of the last seconds.

They are taken from the replica's own Prometheus metrics, so that both tell the same.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping

from prometheus_client import REGISTRY, CollectorRegistry

from services.contracts.observations import Figure

WINDOW_S = 10.0
PREFIX = "multiattempt_rollout_"
_COUNTERS: Mapping[str, tuple[str, ...]] = {  # name, value of its label
    "tokens_per_s": ("tokens_sampled_total",),
    "dialogues_per_s": ("dialogues_total", "completed"),
    "share_idle_tasks": ("engine_idle_seconds_total", "tasks"),
    "share_idle_grading": ("engine_idle_seconds_total", "grading"),
    "grading_s": ("grading_seconds_sum",),
    "gradings": ("grading_seconds_count",),
}
_GAUGES: Mapping[str, str] = {
    "dialogues": "dialogues_running",
    "sequences": "sequences_running",
    "sequences_waiting": "sequences_waiting",
    "kv_cache": "kv_cache_used_ratio",
}
_NAMES = {PREFIX + metric for metric in (*_GAUGES.values(), *(metric for metric, *_ in _COUNTERS.values()))}


class VitalSigns:
    """Remembers the metrics for WINDOW_S. Call it about once a second."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, registry: CollectorRegistry = REGISTRY) -> None:
        self._clock, self._registry = clock, registry
        self._recent: deque[tuple[float, dict[str, float]]] = deque()

    def __call__(self) -> dict[str, Figure]:
        """Figures of the replica: rates per second, shares 0 to 1, grading_ms the mean of a verdict's wait."""
        now, found = self._clock(), self._samples()
        counted = {name: found.get((metric, *labels), 0.0) for name, (metric, *labels) in _COUNTERS.items()}
        while self._recent and self._recent[0][0] < now - WINDOW_S:
            self._recent.popleft()
        self._recent.append((now, counted))
        since, before = self._recent[0]
        grown = {name: value - before[name] for name, value in counted.items()}
        seconds, gradings = now - since, grown.pop("gradings")
        grading_s = grown.pop("grading_s")
        figures: dict[str, Figure] = {name: found.get((metric,), 0.0) for name, metric in _GAUGES.items()}
        if seconds > 0:
            rates = {name: value / seconds for name, value in grown.items()}
            figures |= {name: min(1.0, rate) if name.startswith("share_") else rate for name, rate in rates.items()}
        return figures | {"grading_ms": 1e3 * grading_s / gradings if gradings else None}

    def _samples(self) -> dict[tuple[str, ...], float]:
        """Values by name and labels, of these metrics only: to collect all that a process has takes milliseconds."""
        metrics = self._registry.restricted_registry(_NAMES).collect()
        return {
            (sample.name.removeprefix(PREFIX), *sample.labels.values()): sample.value
            for metric in metrics
            for sample in metric.samples
        }
