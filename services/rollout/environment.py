"""A task: what the model is shown first, how an attempt is judged, what it is told then, what the dialogue earns.

`dialogue.environment` names one: "math", "arithmetic", or `package.module:ClassName`, your own (docs/environments.md).
How turns become tokens is `template`'s business, when an attempt ends `runner`'s, which problems there are `problems`'.
"""

import importlib
import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from services.contracts.config import ConfigError
from services.contracts.settings import DialogueSection
from services.contracts.template import Turn, feedback_turn, neutral_turn, prompt_turns
from services.contracts.wire import Task, Verdict
from services.grader.client import Grade
from services.rollout.reward import reward


class Grader(Protocol):
    """What a dialogue needs of a grader."""

    async def grade(self, response: str, gold: tuple[str, ...]) -> Grade:
        """Judge the last box of `response`. Raises GraderUnavailableError: no answer is no verdict."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """One attempt, judged."""

    verdict: Verdict
    extracted: str | None = None
    """The answer as found; None when there is none."""
    elapsed_ms: float = 0.0
    """Time spent on it, waiting left out."""


async def ask(task: Task, response: str, grader: Grader) -> Judgement:
    """The grader's word on an attempt's text."""
    grade = await grader.grade(response, task.gold)
    return Judgement(grade.verdict, grade.extracted, grade.elapsed_ms)


class Environment(ABC):
    """A task. Every replica makes one and runs all its dialogues on it, so it remembers nothing of any.

    What a method returns depends on its arguments alone: then a task is the same dialogue on every replica, and one
    that a replica left unfinished goes on elsewhere. What a method raises fails that dialogue, and no other.
    """

    def __init__(self, settings: DialogueSection) -> None:
        """settings: the run's [dialogue]."""
        self.settings = settings

    @abstractmethod
    def prompt(self, task: Task) -> Sequence[Turn]:
        """What the model reads before its first attempt; it may try `task.max_attempts` times."""

    @abstractmethod
    def feedback(self, task: Task, judgement: Judgement, attempts_left: int) -> Turn:
        """What it is told after an attempt that was not correct, with `attempts_left` (1 or more) still to come."""

    def neutral(self, task: Task, attempts_left: int) -> Turn:
        """What it is told after any attempt where verdicts are kept from it (`dialogue.feedback = "none"`)."""
        return neutral_turn(self.settings, attempts_left=attempts_left)

    @abstractmethod
    def reward(self, verdicts: Sequence[Verdict]) -> float:
        """Of a finished dialogue whose attempts were judged `verdicts`, in order, at least one; a finite number.

        A dialogue ends at the first CORRECT, with its last attempt, or when its tokens are spent. Where verdicts are
        kept from the model it goes on after a CORRECT, and only the last attempt's verdict is given here.
        """

    async def judge(self, task: Task, response: str, grader: Grader) -> Judgement:
        """Judge an attempt's text; by default the grader does, on the last box.

        It runs on the loop that feeds the engine: what takes more than a millisecond goes to a thread or a service.
        Verdict.UNPARSABLE_GOLD sends the task to the dead letters.
        """
        return await ask(task, response, grader)


class Math(Environment):
    """Problems whose answer stands in a box: prompt, feedback and reward as set in [dialogue]."""

    def prompt(self, task: Task) -> Sequence[Turn]:
        """The system prompt, the examples, the problem."""
        return prompt_turns(self.settings, task.problem, max_attempts=task.max_attempts)

    def feedback(self, task: Task, judgement: Judgement, attempts_left: int) -> Turn:
        """What happened: wrong, no answer, or not compared in time."""
        return feedback_turn(self.settings, judgement.verdict, attempts_left=attempts_left)

    def reward(self, verdicts: Sequence[Verdict]) -> float:
        """`reward.reward`."""
        return reward(verdicts, self.settings)


class Arithmetic(Math):
    """`Math` for bare sums: the model is told its number of attempts, and no more (`settings` has the words)."""


BUILT_IN: dict[str, type[Environment]] = {"math": Math, "arithmetic": Arithmetic}


def load_environment(settings: DialogueSection) -> Environment:
    """Make the environment that `settings.environment` names.

    A module is looked for where Python looks, and in the working directory. Raises ConfigError of one line.
    """
    name = settings.environment
    kind = BUILT_IN.get(name) or _import(name)
    missing = sorted(kind.__abstractmethods__)
    if missing:
        raise _error(name, f"lacks {', '.join(missing)}; see docs/environments.md")
    if not inspect.iscoroutinefunction(kind.judge):
        raise _error(name, "its `judge` must be `async def`")
    try:
        return kind(settings)
    except Exception as error:  # whatever a user's class raises is one line about that class
        raise _error(name, f"cannot be made: {type(error).__name__}: {error}") from error


def _import(name: str) -> type[Environment]:
    module_name, colon, class_name = name.partition(":")
    if not (colon and class_name.isidentifier() and all(part.isidentifier() for part in module_name.split("."))):
        raise _error(name, f"no such environment; {', '.join(BUILT_IN)}, or package.module:ClassName")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # `multiattempt` starts without it, `python -m services...` with it
    try:
        found = getattr(importlib.import_module(module_name), class_name, None)
    except Exception as error:  # whatever a user's module raises is one line about that module
        raise _error(name, f"cannot be imported: {type(error).__name__}: {error}") from error
    if found is None:
        raise _error(name, f"module {module_name} has no {class_name}")
    if not (isinstance(found, type) and issubclass(found, Environment)):
        raise _error(name, "not a subclass of services.rollout.environment.Environment")
    return found


def _error(name: str, fault: str) -> ConfigError:
    return ConfigError(f"dialogue.environment: {name!r}: {' '.join(fault.split())}")
