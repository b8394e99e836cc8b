"""Ask running replicas for dialogues on held-out problems, with each number of allowed attempts in turn.

Knows only HTTP: a replica runs the dialogue at whatever weights it holds; mixed versions during one evaluation
are an error, because the number would belong to no model.
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx

from services.contracts.problems import Problem
from services.contracts.settings import EvaluationSection
from services.evaluation.results import Evaluation, Point

DIALOGUE_TIMEOUT_S = 300.0


class EvaluationError(RuntimeError):
    """The replicas could not be measured; says why."""


async def evaluate(
    urls: Sequence[str],
    problems: Sequence[Problem],
    settings: EvaluationSection,
    *,
    label: str,
    seed: int,
    report: Callable[[Point], None] = lambda point: None,
) -> Evaluation:
    """Accuracy at each of `settings.attempts`, dialogues spread over the replicas at `urls`.

    Dialogue i with N allowed attempts samples with a seed of its own, so a repeated evaluation is the same one.
    Raises EvaluationError when a replica fails or weights change on the way.
    """
    chosen = problems[: settings.problems]
    started = time.monotonic()
    limits = httpx.Limits(max_connections=settings.concurrency)
    slots = asyncio.Semaphore(settings.concurrency)
    async with httpx.AsyncClient(timeout=DIALOGUE_TIMEOUT_S, limits=limits) as client:
        version = await _one_version(client, urls)
        turns = itertools.cycle(urls)

        async def ask(index: int, max_attempts: int) -> dict[str, Any]:
            body = {
                "problem": chosen[index].question,
                "gold": list(chosen[index].gold),
                "max_attempts": max_attempts,
                "seed": (seed * 1_000_003 + index * 101 + max_attempts) % 2**31,
                "sampling": {"temperature": settings.temperature},
            }
            async with slots:
                response = await client.post(f"{next(turns)}/v1/dialogues", json=body)
            if response.status_code != httpx.codes.OK:
                raise EvaluationError(f"a dialogue failed: {response.status_code} {response.text[:300]}")
            answer: dict[str, Any] = response.json()
            return answer

        points = []
        for max_attempts in settings.attempts:
            answers = await asyncio.gather(*(ask(i, max_attempts) for i in range(len(chosen))))
            points.append(_point(max_attempts, [[a["verdict"] for a in answer["attempts"]] for answer in answers]))
            report(points[-1])
        if await _one_version(client, urls) != version:
            raise EvaluationError("weights changed during the evaluation; pause training or evaluate a checkpoint")
    seconds = time.monotonic() - started
    return Evaluation(label, version, settings.temperature, tuple(points), seconds, len(chosen) * len(points) / seconds)


def _point(max_attempts: int, verdicts: Sequence[Sequence[str]]) -> Point:
    return Point(
        max_attempts=max_attempts,
        num_problems=len(verdicts),
        num_solved=sum("correct" in v for v in verdicts),
        num_solved_first=sum(v[:1] == ["correct"] for v in verdicts),
    )


async def _one_version(client: httpx.AsyncClient, urls: Sequence[str]) -> int:
    versions = {}
    for url in urls:
        response = await client.get(f"{url}/v1/weights")
        response.raise_for_status()
        versions[url] = int(response.json()["version"])
    if len(set(versions.values())) != 1:
        raise EvaluationError(f"replicas hold different weights: {versions}")
    return next(iter(versions.values()))
