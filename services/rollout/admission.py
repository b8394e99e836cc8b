"""How many dialogues may be in flight: as many as are asked for, but fewer while the engine's KV cache is full.

A sequence that finds no room in the cache is preempted: what was computed for it is thrown away. The limit begins with
what fits even if every dialogue grew to the whole context. It rises with each completed dialogue while there is room:
by one (it doubles about once a dialogue's life) until sequences were preempted for the first time; then by one for as
many dialogues as the limit. Each time that sequences were preempted it falls by a fifth. Nothing is admitted while the
cache is nearly full. Dialogues already begun are never sent back. (TCP's congestion control: slow start, avoidance.)
"""

from prometheus_client import Gauge

LIMIT = Gauge("multiattempt_rollout_dialogues_limit", "Dialogues of the ledger that may be in flight")
FULL = 0.85  # share of the cache in use from which on nothing more is admitted
FALL = 0.8  # of the limit, at preemptions


class Admission:
    """The limit of one replica. capacity_tokens: of the KV cache."""

    def __init__(self, max_in_flight: int, *, capacity_tokens: int, max_model_len: int) -> None:
        self._max_in_flight = max_in_flight
        self.limit = max(1, min(max_in_flight, capacity_tokens // max_model_len))
        self._num_completed = self._num_preemptions = 0
        self._rise = 0.0  # earned since the last whole one
        self._has_fallen = False
        self._settled_at = 0  # completed dialogues from which on preemptions are the present limit's doing

    def free(self, in_flight: int, *, num_completed: int, num_preemptions: int, kv_cache_used: float) -> int:
        """How many more may begin. num_completed, num_preemptions: since the start; kv_cache_used: 0 to 1, the most
        since the last look.

        Preemptions count when the cache was full: a weight swap preempts all sequences too, and says nothing.
        """
        is_full = kv_cache_used >= FULL
        if is_full and num_preemptions > self._num_preemptions and num_completed >= self._settled_at:
            self.limit = max(1, int(FALL * min(self.limit, in_flight)))
            self._has_fallen, self._rise = True, 0.0
            self._settled_at = num_completed + in_flight - self.limit  # until as many have ended as are too many
        elif not is_full:
            ended = num_completed - self._num_completed
            if in_flight + ended >= self.limit:  # it was the limit that kept others out
                self._rise += ended / self.limit if self._has_fallen else ended
                self.limit = min(self._max_in_flight, self.limit + int(self._rise))
                self._rise %= 1.0
        self._num_completed, self._num_preemptions = num_completed, num_preemptions
        LIMIT.set(self.limit)
        return 0 if is_full and in_flight else max(0, self.limit - in_flight)
