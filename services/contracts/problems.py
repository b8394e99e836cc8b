"""Where problems come from: generated arithmetic, local JSONL, Hugging Face `datasets`.

Train and held-out problems are disjoint by question. Everything is a pure function of the configuration,
so learner and evaluation, which both load problems, see the same ones.
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from services.contracts.config import ConfigError, RunConfig
from services.contracts.settings import DataSection


@dataclass(frozen=True, slots=True)
class Problem:
    """A question and the answers that are right."""

    question: str
    gold: tuple[str, ...]
    rationale: str = ""  # the working, for the supervised warm-up only


@dataclass(frozen=True, slots=True)
class Problems:
    """The two sides of a data set; no question is on both."""

    train: Sequence[Problem]
    heldout: Sequence[Problem]


def load_problems(config: RunConfig) -> Problems:
    """Load the run's problems. Raises ConfigError naming the file and the field at fault."""
    data = config.data
    if data.source == "arithmetic":
        train, heldout = list(arithmetic(data.digits)), []
    else:
        if not data.train:
            raise ConfigError(f'data.train: empty; data.source = "{data.source}" needs a file or data set name')
        train, heldout = load_set(data, data.train), load_set(data, data.heldout) if data.heldout else []
    if heldout:
        seen = {problem.question for problem in heldout}
        train = [problem for problem in train if problem.question not in seen]
    else:
        seed = config.run.seed if data.split_seed is None else data.split_seed
        train, heldout = _split(train, data.heldout_size, seed)
    if not train:
        raise ConfigError(f"data.train: {data.train or data.source}: no training problem is left")
    return Problems(train=train, heldout=heldout)


def arithmetic(digits: int) -> Iterator[Problem]:
    """Every sum of two `digits`-digit numbers, in a fixed order: `23+48` -> `71`.

    The rationale is the sum of each column from the right, the carry added in: `11,7`.
    """
    low, high = (10 ** (digits - 1) if digits > 1 else 0), 10**digits
    for a, b in itertools.product(range(low, high), repeat=2):
        yield Problem(f"{a}+{b}", (str(a + b),), _column_sums(a, b))


def _column_sums(a: int, b: int) -> str:
    sums, carry = [], 0
    for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
        sums.append(int(x) + int(y) + carry)
        carry = sums[-1] // 10
    return ",".join(map(str, sums))


def _split(problems: list[Problem], heldout_size: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    unique = list({problem.question: problem for problem in problems}.values())
    if len(unique) <= heldout_size:
        raise ConfigError(
            f"data.heldout_size: {heldout_size} leaves no training problem, there are {len(unique)} distinct questions"
        )
    order = np.random.default_rng(seed).permutation(len(unique))
    return [unique[i] for i in order[heldout_size:]], [unique[i] for i in order[:heldout_size]]


def load_set(data: DataSection, name: str) -> list[Problem]:
    """All problems of a file (`data.source = "jsonl"`) or a data set on the hub, by the fields that `data` names.

    Raises ConfigError.
    """
    rows = jsonl_rows(Path(name)) if data.source == "jsonl" else hub_rows(name)
    problems = list(_problems(rows, data, name))
    if not problems:
        raise ConfigError(f"{name}: the data set is empty")
    return problems


def _problems(rows: Iterable[tuple[str, dict[str, Any]]], data: DataSection, name: str) -> Iterator[Problem]:
    pattern = _compile(data.answer_pattern)
    question_fields = [field.strip() for field in data.question_field.split(",")]
    wanted = [("question_field", field) for field in question_fields] + [("answer_field", data.answer_field)]
    if data.rationale_field:
        wanted.append(("rationale_field", data.rationale_field))
    for where, row in rows:
        for setting, field in wanted:
            if field not in row:
                raise ConfigError(f"{where}: no column {field!r} (data.{setting}); columns: {', '.join(row)}")
        answers = row[data.answer_field]
        question = " ".join(str(row[field]) for field in question_fields)
        rationale = str(row[data.rationale_field]) if data.rationale_field else ""
        golds = tuple(_gold(answer, pattern, where) for answer in (answers if isinstance(answers, list) else [answers]))
        yield Problem(question, golds, rationale)


def _gold(answer: object, pattern: re.Pattern[str] | None, where: str) -> str:
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)  # "8.0" and "8" are one answer; MAWPS stores floats
    text = str(answer)
    if pattern is not None:
        match = pattern.search(text)
        if match is None:
            raise ConfigError(f"{where}: data.answer_pattern {pattern.pattern!r} finds nothing in {text[-80:]!r}")
        text = match.group(1)
    return text.strip()


def _compile(pattern: str) -> re.Pattern[str] | None:
    if not pattern:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"data.answer_pattern: not a regular expression: {error}") from error
    if compiled.groups < 1:
        raise ConfigError("data.answer_pattern: needs a group around the answer, for example '####\\s*(.+)'")
    return compiled


def jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, row) for each object in a file of JSON lines. Raises ConfigError."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON strings may hold other line ends
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ConfigError(f"{path}: no such data file") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigError(f"{path}:{number}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ConfigError(f"{path}:{number}: expected an object, got {type(row).__name__}")
            yield f"{path}:{number}", row


def hub_rows(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """`name`, `name:split` or `name:config:split` on the Hugging Face hub."""
    try:
        import datasets
    except ImportError as error:
        raise ConfigError('data.source = "hub" needs the package `datasets`: pip install datasets') from error
    parts = name.split(":")
    split = parts[-1] if len(parts) > 1 else "train"
    config_name = parts[1] if len(parts) > 2 else None
    try:
        rows = datasets.load_dataset(parts[0], config_name, split=split)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}: cannot load the data set: {(str(error) or repr(error)).splitlines()[0]}") from error
    for number, row in enumerate(rows):
        yield f"{name}[{number}]", dict(row)
