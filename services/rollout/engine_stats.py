"""What vLLM says of itself, as metrics: sequences, KV cache, preemptions, waits. It is told after each engine step.

Stands where vLLM wants a `StatLoggerBase`, but needs nothing of vLLM: its statistics come in as they are.
"""

from typing import Any

from prometheus_client import Counter, Gauge, Histogram

RUNNING = Gauge("multiattempt_rollout_sequences_running", "Sequences that the engine decodes now")
WAITING = Gauge("multiattempt_rollout_sequences_waiting", "Sequences that wait for a place in the engine")
KV_CACHE = Gauge("multiattempt_rollout_kv_cache_used_ratio", "Share of the KV cache in use, 0 to 1")
PREEMPTIONS = Counter("multiattempt_rollout_preemptions_total", "Sequences put off for want of KV cache, to begin anew")
PROMPT_TOKENS = Counter("multiattempt_rollout_prompt_tokens_total", "Tokens looked up in the prefix cache")
CACHED_TOKENS = Counter("multiattempt_rollout_prompt_tokens_cached_total", "Those of them that were found there")
WAIT_SECONDS = Histogram(
    "multiattempt_rollout_engine_wait_seconds",
    "From an attempt's arrival in the engine to its first step there",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)


class EngineStats:
    """The engine's state after its last step."""

    def __init__(self) -> None:
        self.num_running = 0  # sequences
        self.num_waiting = 0  # sequences
        self.kv_cache_used = 0.0  # 0 to 1
        self.num_preemptions = 0  # since the start
        self._peak = 0.0

    def take_peak(self) -> float:
        """Most of `kv_cache_used` since the last call."""
        peak, self._peak = self._peak, self.kv_cache_used
        return peak

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """Take vLLM's statistics of one step; either kind may be missing."""
        if scheduler_stats is not None:
            self.num_running = scheduler_stats.num_running_reqs
            self.num_waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            self.kv_cache_used = scheduler_stats.kv_cache_usage
            self._peak = max(self._peak, self.kv_cache_used)
            RUNNING.set(self.num_running)
            WAITING.set(self.num_waiting)
            KV_CACHE.set(self.kv_cache_used)
            PROMPT_TOKENS.inc(scheduler_stats.prefix_cache_stats.queries)
            CACHED_TOKENS.inc(scheduler_stats.prefix_cache_stats.hits)
        if iteration_stats is not None:
            self.num_preemptions += iteration_stats.num_preempted_reqs
            PREEMPTIONS.inc(iteration_stats.num_preempted_reqs)
            for finished in iteration_stats.finished_requests:
                WAIT_SECONDS.observe(finished.queued_time)

    def log_engine_initialized(self) -> None:
        """Vllm says that it is up: nothing to do."""

    def log(self) -> None:
        """Vllm wants a line in the log: metrics are enough."""

    def record_sleep_state(self, is_awake: int, level: int) -> None:
        """Never put to sleep here."""
