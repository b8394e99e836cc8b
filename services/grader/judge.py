"""From a response to a judgement: extract, look in the cache, else ask the pool. What every HTTP route shares."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client import Counter

from services.contracts.wire import Verdict
from services.grader.answer import Extraction, extract, is_blank, unwrap
from services.grader.explain import MAX_GOLDS as MAX_EXPLAINED
from services.grader.explain import Explanation
from services.grader.pool import Item, Outcome, Pool

MAX_GOLDS = 64
MAX_GOLD_CHARS = 8_192
YIELD_EVERY = 16  # extractions between two looks at the event loop: one takes up to a millisecond

_VERDICTS = Counter(
    "multiattempt_grader_items_total", "Items judged, by verdict and deciding layer", ["verdict", "method"]
)
_HITS = Counter("multiattempt_grader_cache_hits_total", "Items answered from the cache")


@dataclass(frozen=True, slots=True)
class Question:
    """A response and the gold answers, any of which is right."""

    response: str
    golds: tuple[str, ...]
    extraction: Extraction


@dataclass(frozen=True, slots=True)
class Judgement:
    """The verdict on one question; `elapsed_ms` leaves out time in the queue."""

    verdict: Verdict
    extracted: str | None
    method: str | None
    elapsed_ms: float
    is_cached: bool

    @property
    def is_correct(self) -> bool:
        """Whether the answer earns the reward."""
        return self.verdict is Verdict.CORRECT


class Judge:
    """Judges questions on a pool. A verdict is a pure function of answer and golds, so it may be remembered."""

    def __init__(self, pool: Pool, *, cache_items: int) -> None:
        self._pool = pool
        self._cache_items = cache_items
        self._cache: OrderedDict[Item, Outcome] = OrderedDict()

    async def judge(self, questions: Sequence[Question]) -> list[Judgement]:
        """Judge side by side, in order. Raises PoolBusyError or BatchTooLargeError, then for all of them."""
        judgements: list[Judgement | None] = []
        waiting: dict[Item, list[tuple[int, float]]] = {}
        for index, question in enumerate(questions):
            judged = self._at_once(question)
            if isinstance(judged, Judgement):
                judgements.append(judged)
            else:
                item, extraction_ms = judged
                waiting.setdefault(item, []).append((index, extraction_ms))
                judgements.append(None)
            if index % YIELD_EVERY == YIELD_EVERY - 1:
                await asyncio.sleep(0)
        outcomes = await self._pool.grade_all(list(waiting))
        for (item, places), outcome in zip(waiting.items(), outcomes, strict=True):
            self._remember(item, outcome)
            for index, extraction_ms in places:
                judgements[index] = _judgement(item, outcome, elapsed_ms=extraction_ms + outcome.elapsed_ms)
        complete = [judgement for judgement in judgements if judgement is not None]
        for judgement in complete:
            _VERDICTS.labels(judgement.verdict.value, judgement.method or "none").inc()
        return complete

    async def explain(self, question: Question) -> tuple[Judgement, Explanation]:
        """Judge one question, and say how both sides look and are compared. Raises PoolBusyError."""
        [judgement] = await self.judge([question])
        golds = tuple(gold if len(gold) <= MAX_GOLD_CHARS else "" for gold in question.golds[:MAX_EXPLAINED])
        fields = await self._pool.explain(judgement.extracted or "", golds)
        return judgement, Explanation(**fields) if fields else Explanation.nothing(len(golds))

    def _at_once(self, question: Question) -> Judgement | tuple[Item, float]:
        """What needs no worker: no answer, no gold, or a known comparison. Else the item and the time spent, in ms."""
        started = time.perf_counter()
        golds = tuple(gold for gold in question.golds if len(gold) <= MAX_GOLD_CHARS and not is_blank(unwrap(gold)))
        answer = extract(question.response, mode=question.extraction) if golds else None
        elapsed_ms = (time.perf_counter() - started) * 1000.0
        if answer is None:
            verdict = Verdict.NO_ANSWER if golds else Verdict.UNPARSABLE_GOLD
            return Judgement(verdict, None, None, elapsed_ms, is_cached=False)
        item = Item(answer, golds[:MAX_GOLDS])
        known = self._cache.get(item)
        if known is None:
            return item, elapsed_ms
        self._cache.move_to_end(item)
        _HITS.inc()
        return _judgement(item, known, elapsed_ms=elapsed_ms, is_cached=True)

    def _remember(self, item: Item, outcome: Outcome) -> None:
        if outcome.verdict is Verdict.TIMEOUT or len(item.answer) + sum(map(len, item.golds)) > 1_000:
            return  # a timeout may be the machine's fault; long items would make the cache's size unbounded
        self._cache[item] = outcome
        if len(self._cache) > self._cache_items:
            self._cache.popitem(last=False)


def _judgement(item: Item, outcome: Outcome, *, elapsed_ms: float, is_cached: bool = False) -> Judgement:
    return Judgement(outcome.verdict, item.answer, outcome.method, elapsed_ms, is_cached)
