"""What an evaluation asks for: every dialogue, its seed, and the fingerprint by which a resumed one is the same. Pure.

Dialogues with N allowed attempts are asked for with each N on its own, as the model is told N. Independent samples, for
pass@k, are dialogues with one attempt; where they are sampled as the others are, the two share their dialogues.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from services.contracts.config import ConfigError
from services.contracts.problems import Problem
from services.evaluation.benchmarks import ProblemSet

MAX_ATTEMPTS = 64
MAX_SEEDS = 1000

Feedback = Literal["truth", "none"]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is asked for. A finished dialogue is good for a later run with the same settings, and for no other."""

    benchmarks: tuple[str, ...]  # names
    attempts: Annotated[tuple[int, ...], msgspec.Meta(min_length=1)]  # values of N
    seeds: int = 3  # dialogues of each problem and N
    samples: int = 0  # independent single attempts of each problem
    temperature: float = 1.0  # of the dialogues; 0: greedy
    sample_temperature: float = 1.0  # of the independent samples
    feedback: Feedback = "truth"
    seed: int = 42
    problems: int | None = None  # so many of each benchmark, drawn by `seed`; None: all


class Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An evaluation's identity, kept beside its dialogues."""

    model: str
    weights: dict[str, Any]  # fingerprint, or what a replica says of its weights
    settings: Settings
    data: dict[str, str]  # benchmark -> digest of its problems
    dialogue: dict[str, Any] | None  # settings of prompt, budgets and sampling; None: a running replica's own
    schema: int = 1


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """One dialogue to be asked for."""

    benchmark: str
    problem_id: str
    max_attempts: int
    seed_index: int
    temperature: float

    @property
    def key(self) -> tuple[str, str, int, int, float]:
        """Its identity within an evaluation."""
        return self.benchmark, self.problem_id, self.max_attempts, self.seed_index, self.temperature


def check(settings: Settings) -> None:
    """Raise ConfigError for the first setting that makes no sense."""
    for n in settings.attempts:
        if not 1 <= n <= MAX_ATTEMPTS:
            raise ConfigError(f"--attempts: {n}: a dialogue has 1 to {MAX_ATTEMPTS} attempts")
    for name, value, low in (("--seeds", settings.seeds, 1), ("--samples", settings.samples, 0)):
        if not low <= value <= MAX_SEEDS:
            raise ConfigError(f"{name}: {value}: must be {low} to {MAX_SEEDS}")
    if settings.temperature < 0:
        raise ConfigError(f"--temperature: {settings.temperature:g} is below 0 (0 is greedy)")
    if settings.temperature == 0 and settings.seeds > 1:
        raise ConfigError("--seeds: greedy dialogues are all the same: 1 seed, or a --temperature above 0")
    if settings.samples and settings.sample_temperature <= 0:
        raise ConfigError("--sample-temperature: independent samples need one above 0")
    if settings.problems is not None and settings.problems < 1:
        raise ConfigError(f"--problems: {settings.problems}: at least 1")


def parse_attempts(text: str) -> tuple[int, ...]:
    """`1-7`, `1,3,5` or both mixed -> the numbers in order. Raises ConfigError."""
    found: set[int] = set()
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        try:
            first, last = int(low), int(high if dash else low)
        except ValueError as error:
            raise ConfigError(f"--attempts: {text!r}: expected numbers and ranges, for example 1-5 or 1,3,7") from error
        if not 1 <= first <= last <= MAX_ATTEMPTS:
            raise ConfigError(f"--attempts: {part.strip()}: a dialogue has 1 to {MAX_ATTEMPTS} attempts")
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def problem_id(problem: Problem) -> str:
    """Of its question: the same in every evaluation, whatever else is asked."""
    return hashlib.sha256(problem.question.encode()).hexdigest()[:12]


def chosen(problem_set: ProblemSet, settings: Settings) -> dict[str, Problem]:
    """The problems that are asked, by id, in the order of the data."""
    problems = problem_set.problems
    if settings.problems is not None and settings.problems < len(problems):
        order = np.random.default_rng(settings.seed).permutation(len(problems))[: settings.problems]
        problems = tuple(problems[i] for i in sorted(order))
    return {problem_id(problem): problem for problem in problems}


def digest(problems: Mapping[str, Problem]) -> str:
    """Of questions and answers: another file under the same name is another benchmark."""
    found = hashlib.sha256()
    for problem in problems.values():
        found.update(msgspec.json.encode((problem.question, problem.gold)))
    return found.hexdigest()[:16]


def asks(settings: Settings, problems: Mapping[str, Mapping[str, Problem]]) -> list[Ask]:
    """Every dialogue once, by benchmark, then N: a curve grows point by point."""
    unique = {ask.key: ask for name in problems for ask in _of_benchmark(name, settings, list(problems[name]))}
    return list(unique.values())


def _of_benchmark(name: str, settings: Settings, ids: Sequence[str]) -> Iterator[Ask]:
    wanted = [(n, settings.seeds, settings.temperature) for n in settings.attempts]
    for max_attempts, seeds, temperature in [*wanted, (1, settings.samples, settings.sample_temperature)]:
        for seed_index in range(seeds):
            for identity in ids:
                yield Ask(
                    benchmark=name,
                    problem_id=identity,
                    max_attempts=max_attempts,
                    seed_index=seed_index,
                    temperature=temperature,
                )


def sampling_seed(ask: Ask, seed: int) -> int:
    """The dialogue's, 31 bits. Attempt k samples with the k-th number after it, so that none may be near another's."""
    found = hashlib.sha256(msgspec.json.encode((seed, ask.key))).digest()
    return int.from_bytes(found[:4], "big") % 2**31


def differences(before: Header, now: Header) -> list[str]:
    """What of an evaluation's identity is another: `settings.temperature: 0.0 there, 1.0 here`."""
    found = []
    old, new = (msgspec.to_builtins(header) for header in (before, now))
    for name in old:
        parts = [(name, old[name], new[name])]
        if isinstance(old[name], dict) and isinstance(new[name], dict):
            keys = dict.fromkeys([*old[name], *new[name]])
            parts = [(f"{name}.{key}", old[name].get(key), new[name].get(key)) for key in keys]
        found += [f"{path}: {_short(then)} there, {_short(here)} here" for path, then, here in parts if then != here]
    return found


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
