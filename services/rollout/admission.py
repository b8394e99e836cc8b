"""How many dialogues may begin: so many that the engine always has enough to sample, but no more than its cache bears.

What is limited is the number that are being sampled; those that wait for a verdict hold nothing in the engine, and
others are sampled meanwhile.

A sequence that finds no room in the cache is preempted: what was computed for it is thrown away. The limit begins with
what fits even if every dialogue grew to the whole context. It rises with each completed dialogue while there is room:
by one (it doubles about once a dialogue's life) until sequences were preempted for the first time; then by one for as
many dialogues as the limit. Each time that sequences were preempted it falls by a fifth. Nothing is admitted while the
cache is nearly full. What has begun is never sent back. (TCP's congestion control: slow start, avoidance.)
"""

import math

from prometheus_client import Gauge

LIMIT = Gauge("multiattempt_rollout_sampled_limit", "Dialogues sampled at once up to which others may begin")
FULL = 0.85  # share of the cache in use from which on nothing more is admitted
FALL = 0.8  # of the limit, at preemptions
LAG_S = 0.2  # for which the engine has attempts in stock: until others come for those that have ended
PERIOD_S = 0.5  # over which their rate is measured


class Admission:
    """The limit of one replica. max_num_seqs: sequences decoded together; capacity_tokens: of the cache."""

    def __init__(self, *, max_num_seqs: int, capacity_tokens: int, max_model_len: int) -> None:
        self._max_num_seqs = max_num_seqs
        self.limit = max(1, min(max_num_seqs, capacity_tokens // max_model_len))
        self._num_completed = self._num_preemptions = 0
        self._rise = 0.0  # earned since the last whole one
        self._has_fallen = False
        self._stock = -(-self.limit // 8)  # attempts that wait in the engine: a place that comes free is taken at once
        self._counted_at, self._counted = math.inf, 0  # no rate before the first look
        self._settled_at = 0  # completed dialogues from which on preemptions are the present limit's doing

    def free(
        self,
        sampled: int,
        *,
        num_attempts: int,
        num_completed: int,
        num_preemptions: int,
        kv_cache_used: float,
        now_s: float,
    ) -> int:
        """How many more may begin. sampled: being sampled now, or waiting in the engine for it; num_attempts (begun),
        num_completed (dialogues), num_preemptions: since the start; kv_cache_used: 0 to 1, most since the last look.

        Preemptions count when the cache was full: a weight swap preempts all sequences too, and says nothing.
        """
        is_full = kv_cache_used >= FULL
        if is_full and num_preemptions > self._num_preemptions and num_completed >= self._settled_at:
            self.limit = max(1, int(FALL * min(self.limit, sampled)))
            self._has_fallen, self._rise = True, 0.0
            self._settled_at = num_completed + sampled - self.limit  # until as many have ended as are too many
        elif not is_full:
            ended = num_completed - self._num_completed
            if sampled + ended >= self.limit:  # it was the limit that kept others out
                self._rise += ended / self.limit if self._has_fallen else ended
                self.limit = min(self._max_num_seqs, self.limit + int(self._rise))
                self._rise %= 1.0
        self._num_completed, self._num_preemptions = num_completed, num_preemptions
        LIMIT.set(self.limit)
        self._measure_stock(num_attempts, now_s)
        stock = 0 if self._has_fallen else self._stock
        return 0 if is_full and sampled else max(0, self.limit + stock - sampled)

    def _measure_stock(self, num_attempts: int, now_s: float) -> None:
        """Little's law: so many attempts end, and others must be there, before the dialogues hear of it."""
        passed_s = now_s - self._counted_at
        if passed_s < 0:
            self._counted_at, self._counted = now_s, num_attempts
        if passed_s > PERIOD_S:
            rate = (num_attempts - self._counted) / passed_s
            self._stock = min(self.limit, max(math.ceil(LAG_S * rate), self._stock // 2))
            self._counted_at, self._counted = now_s, num_attempts
