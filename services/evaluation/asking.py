"""Asks running replicas for dialogues over HTTP, many at once, and keeps each as it comes.

A replica that is busy, away or being started again is waited for; weights that change on the way are an error, because
the figures would belong to no model. What a dialogue is asked for is `plan`'s business.
"""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import httpx

from services.contracts.problems import Problem
from services.evaluation.journal import Attempt, Dialogue, Journal
from services.evaluation.plan import Ask, Settings, sampling_seed
from services.evaluation.run import EvaluationError

DIALOGUE_TIMEOUT_S = 3600.0  # 64 attempts of a large model on a slow machine
ANSWER_TIMEOUT_S = 30.0  # of a question about weights
CONNECT_TIMEOUT_S = 10.0
POOL = 16  # connections that share a client
FIRST_PAUSE_S, LAST_PAUSE_S = 0.2, 5.0
ABOUT_THE_PROBLEM = ("body.problem", "body.gold")  # a 422 for these refuses one problem, not the evaluation


@dataclass(frozen=True, slots=True)
class Weights:
    """What a replica says of its weights."""

    version: int
    digest: str | None  # of a version that was delivered; None: those that it started with
    model: str  # folder of those


@dataclass(slots=True)
class Tally:
    """How far an evaluation is."""

    total: int
    num_done: int = 0  # those of an earlier start among them
    num_new: int = 0
    num_tokens: int = 0  # sampled, of the new ones
    seconds: float = 0.0
    asked: Counter[tuple[str, int, float]] = field(default_factory=Counter)  # (benchmark, N, temperature) -> all
    done: Counter[tuple[str, int, float]] = field(default_factory=Counter)
    solved: Counter[tuple[str, int, float]] = field(default_factory=Counter)

    def count(self, dialogue: Dialogue) -> None:
        """Take one in."""
        point = point_of(dialogue)
        self.num_done += 1
        self.done[point] += 1
        self.solved[point] += dialogue.is_solved


def point_of(ask: Ask) -> tuple[str, int, float]:
    """The point of a curve that a dialogue belongs to."""
    return ask.benchmark, ask.max_attempts, ask.temperature


async def weights_of(urls: Sequence[str]) -> Weights:
    """The weights that all replicas hold. Raises EvaluationError when one does not answer, or holds others."""
    found: dict[str, Weights] = {}
    async with httpx.AsyncClient(timeout=ANSWER_TIMEOUT_S, trust_env=False) as client:
        for url in urls:
            try:
                response = await client.get(f"{url}/v1/weights")
                response.raise_for_status()
                answer = response.json()
                found[url] = Weights(int(answer["version"]), answer.get("digest"), str(answer.get("model", "")))
            except httpx.HTTPStatusError as error:
                raise EvaluationError(f"{url}: {_reason(error.response)}") from error
            except httpx.TransportError as error:
                raise EvaluationError(f"{url}: no answer ({error or type(error).__name__})") from error
            except (ValueError, KeyError, TypeError) as error:
                raise EvaluationError(f"{url}: what answers there is no rollout replica") from error
    if len(set(found.values())) > 1:
        told = ", ".join(f"{url}: version {weights.version}" for url, weights in found.items())
        raise EvaluationError(f"replicas hold different weights ({told})")
    return next(iter(found.values()))


class Asker:
    """Asks for everything that is not in the journal yet. patience_s: for a replica that does not answer.

    tell: called after each dialogue.
    """

    def __init__(
        self,
        urls: Sequence[str],
        journal: Journal,
        settings: Settings,
        problems: Mapping[str, Mapping[str, Problem]],
        *,
        patience_s: float,
        tell: Callable[[Tally], None] = lambda tally: None,
    ) -> None:
        self._turns = itertools.cycle(urls)
        self._journal, self._settings, self._problems = journal, settings, problems
        self._patience_s, self._tell = patience_s, tell
        self._answered = time.monotonic()  # any replica, any dialogue

    async def run(self, asks: Sequence[Ask], *, version: int, concurrency: int) -> Tally:
        """Ask, `concurrency` dialogues at a time, in this order. Raises EvaluationError; what came by then is kept."""
        self._tally = Tally(total=len(asks))
        for ask in asks:
            self._tally.asked[point_of(ask)] += 1
            if (before := self._journal.done.get(ask.key)) is not None:
                self._tally.count(before)
        waiting = iter([ask for ask in asks if ask.key not in self._journal.done])
        self._started = self._answered = time.monotonic()
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(_client()) for _ in range(-(-concurrency // POOL))]
            asking = [asyncio.create_task(self._work(clients[i // POOL], waiting, version)) for i in range(concurrency)]
            try:
                await asyncio.gather(*asking)
            finally:
                for task in asking:
                    task.cancel()
                await asyncio.gather(*asking, return_exceptions=True)
        return self._tally

    async def _work(self, client: httpx.AsyncClient, waiting: Iterator[Ask], version: int) -> None:
        for ask in waiting:
            dialogue = await self._ask(client, ask, version)
            try:
                self._journal.add(dialogue)
            except OSError as error:
                raise EvaluationError(f"a dialogue could not be written: {error.strerror}") from error
            self._tally.count(dialogue)
            self._tally.num_new += 1
            self._tally.num_tokens += dialogue.num_sampled
            self._tally.seconds = time.monotonic() - self._started
            self._tell(self._tally)

    async def _ask(self, client: httpx.AsyncClient, ask: Ask, version: int) -> Dialogue:
        problem = self._problems[ask.benchmark][ask.problem_id]
        seed = sampling_seed(ask, self._settings.seed)
        body: dict[str, Any] = {
            "problem": problem.question,
            "gold": list(problem.gold),
            "max_attempts": ask.max_attempts,
            "seed": seed,
            "sampling": {"temperature": ask.temperature},
            "feedback": self._settings.feedback,
        }
        answer = await self._patiently(client, body)
        identity = {name: getattr(ask, name) for name in Ask.__struct_fields__}
        kept: dict[str, Any] = {"question": problem.question, "gold": problem.gold, "seed": seed}
        if answer.status_code == httpx.codes.UNPROCESSABLE_ENTITY:
            return Dialogue(**identity, **kept, attempts=(), refused=_refusal(answer))
        if not answer.is_success:
            raise EvaluationError(f"a dialogue failed: {_reason(answer)}")
        told = answer.json()
        if told["weight_versions"] != [version]:
            versions = ", ".join(map(str, told["weight_versions"]))
            raise EvaluationError(
                f"weights changed during the evaluation: a dialogue is of version {versions}, not {version}; "
                f"pause training, or evaluate a checkpoint"
            )
        attempts = tuple(
            Attempt(text=a["text"], verdict=a["verdict"], extracted=a["extracted"], num_tokens=a["num_tokens"])
            for a in told["attempts"]
        )
        return Dialogue(
            **identity,
            **kept,
            attempts=attempts,
            finish_reason=told["finish_reason"],
            num_tokens=told["num_tokens"],
            seconds=told["seconds"]["total"],
        )

    async def _patiently(self, client: httpx.AsyncClient, body: Mapping[str, Any]) -> httpx.Response:
        """Ask one replica after the other until one takes it. Raises EvaluationError when none has for too long."""
        pause_s = FIRST_PAUSE_S
        while True:
            url = next(self._turns)
            try:
                answer = await client.post(f"{url}/v1/dialogues", json=body)
                trouble = _reason(answer)
            except httpx.TransportError as error:
                answer, trouble = None, f"no answer ({error or type(error).__name__})"
            if answer is not None and not answer.is_server_error:
                self._answered = time.monotonic()
                return answer
            if time.monotonic() - self._answered > self._patience_s:
                raise EvaluationError(f"no replica has answered for {self._patience_s:g} s; the last, {url}: {trouble}")
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LAST_PAUSE_S)


def _client() -> httpx.AsyncClient:
    """For POOL dialogues at a time: httpx looks at every connection of a pool for each request."""
    limits = httpx.Limits(max_connections=POOL, max_keepalive_connections=POOL)
    timeout = httpx.Timeout(DIALOGUE_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    return httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False)


def _refusal(answer: httpx.Response) -> str:
    """Why one problem cannot be run. Raises EvaluationError when it is not the problem that is at fault."""
    told = answer.json()
    faults = [fault["where"] for fault in told.get("errors", ())]
    if not all(fault.startswith(ABOUT_THE_PROBLEM) for fault in faults):
        raise EvaluationError(f"the replica does not take these dialogues: {_reason(answer)}")
    return str(told["detail"])


def _reason(answer: httpx.Response) -> str:
    try:
        told = answer.json()
        detail = told["detail"] if isinstance(told, dict) and "detail" in told else answer.text
    except ValueError:
        detail = answer.text
    return f"{answer.status_code} {' '.join(str(detail).split())[:300]}"
