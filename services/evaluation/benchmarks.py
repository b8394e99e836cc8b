"""The benchmarks: where each one's problems are, which fields hold question and answer, how many there must be.

    load("math500", folder=Path("../shared/data"), data=DataSection())      # folder/math500.jsonl
    load("math500", folder=None, data=...)                                  # from the Hugging Face hub
    load("mine=problems.jsonl", ...), load("mine=hub:owner/name:split", ...)  # any other, by the fields of [data]

A set whose number of rows is not the published one is refused: half a benchmark is another benchmark. Rows that repeat
a question are asked once, since a problem that counts twice is no second observation.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.contracts.config import ConfigError, RunConfig
from services.contracts.problems import Problem, hub_rows, jsonl_rows, load_problems, load_set
from services.contracts.settings import DataSection

HELDOUT = "heldout"  # the held-out problems of the run's own [data]
HUB = "hub:"
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Source:
    """A form in which a benchmark is to be had."""

    questions: tuple[str, ...]  # fields, joined by a space
    answer: str  # field
    golds: Callable[[Any], tuple[str, ...]]  # what is in that field -> right answers
    count: int  # rows


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A known set."""

    name: str
    title: str
    answers: str  # their form, for people
    file: Source  # NAME.jsonl in a folder
    hub_name: str = ""  # `name:split` or `name:config:split`; empty: there is no copy with these problems
    hub: Source | None = None  # where its form there is another


@dataclass(frozen=True, slots=True)
class ProblemSet:
    """The problems of one benchmark, each question once, in the order of the data."""

    name: str
    title: str
    problems: tuple[Problem, ...]
    num_rows: int  # before repeated questions were left out


def as_text(value: Any) -> tuple[str, ...]:
    """A string as it stands."""
    return (str(value).strip(),)


def as_number(value: Any) -> tuple[str, ...]:
    """A number without `.0`; AIME's `025` is 25. The grader takes 2/3 for the 0.6666666667 of MAWPS."""
    text = str(value).strip()
    return (str(int(float(text))) if float(text).is_integer() else text,)


def after_hashes(value: Any) -> tuple[str, ...]:
    """GSM8K: what follows `####`, without the commas between thousands."""
    return (str(value).rpartition("####")[2].strip().replace(",", ""),)


def without_unit(value: Any) -> tuple[str, ...]:
    """ASDiv: `9 (apples)` -> 9. A text without a trailing unit is the answer itself."""
    text = str(value).strip()
    number = re.fullmatch(r"(\S.*?)\s+\([^()]*\)", text)
    return (number[1] if number else text,)


def last_box(value: Any) -> tuple[str, ...]:
    """What the last closed box of a solution holds, whole: braces are matched, not searched for. Plain text is itself.

    One answer of Minerva's is Python: `np.arcsin(10/13)`.
    """
    text = str(value)
    found = text
    for opening in BOX.finditer(text):
        depth, position = 1, opening.end()
        while depth and position < len(text):
            step = 2 if text[position] == "\\" else 1
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            position += step
        if not depth:
            found = text[opening.end() : position - 1]
    return (re.sub(r"\bnp\.(?=[a-z])", "", found).strip(),)


def first_of_list(value: Any) -> tuple[str, ...]:
    """OlympiadBench: a list of one text, in which several answers are separated by commas."""
    values = value if isinstance(value, list) else [value]
    return (str(values[0]).strip(),) if values else ("",)


KNOWN: Mapping[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "aime24", "AIME 2024", "integers 0 to 999", Source(("problem",), "answer", as_number, 30),
            "HuggingFaceH4/aime_2024:train",
        ),
        Benchmark(
            "amc23", "AMC 2023", "integers", Source(("problem",), "answer", as_number, 40),
            "math-ai/amc23:test", Source(("question",), "answer", as_number, 40),
        ),
        Benchmark(
            # `answer`, not the box of `solution`: the reference's way from there leaves nothing of `\\text{east}`.
            "math500", "MATH500", "LaTeX", Source(("problem",), "answer", as_text, 500),
            "HuggingFaceH4/MATH-500:test",
        ),
        Benchmark(
            "minerva_math", "Minerva Math", "LaTeX, in the box of the solution",
            Source(("problem",), "solution", last_box, 272),
            "math-ai/minervamath:test", Source(("question",), "answer", last_box, 272),
        ),
        Benchmark(
            # The whole of it: the reference's two halves are one file, the last 339 problems, counted twice.
            "olympiadbench", "OlympiadBench", "LaTeX; several answers separated by commas",
            Source(("question",), "final_answer", first_of_list, 675),
            "zwhe99/simplerl-OlympiadBench:test",
        ),
        Benchmark(
            "gsm8k", "GSM8K", "integers, after ####", Source(("question",), "answer", after_hashes, 1319),
            "openai/gsm8k:main:test",
        ),
        Benchmark(
            "svamp", "SVAMP", "numbers", Source(("Body", "Question"), "Answer", as_number, 1000),
            "ChilleD/SVAMP:train+test",
        ),
        Benchmark(
            "asdiv", "ASDiv", "numbers with a unit in parentheses, ratios, names",
            Source(("body", "question"), "answer", without_unit, 2215),
            "EleutherAI/asdiv:asdiv:validation", Source(("body", "question"), "answer", without_unit, 2305),
        ),
        Benchmark("mawps", "MAWPS", "numbers", Source(("input",), "target", as_number, 2065)),
    )
}  # fmt: skip
PAPER = ("aime24", "math500", "amc23", "minerva_math", "olympiadbench")


def load(name: str, *, folder: Path | None, config: RunConfig) -> ProblemSet:
    """Load one set, by its name or as `name=file.jsonl`, `name=hub:data-set`. Raises ConfigError of one line.

    folder: where `NAME.jsonl` of a known set is; None: from the hub. config: its [data] has the fields of other sets.
    """
    title, equals, where = name.partition("=")
    if equals:
        return _other(title.strip(), where.strip(), config.data)
    if name == HELDOUT:
        heldout = load_problems(config).heldout
        return _distinct(HELDOUT, "held-out problems", heldout, num_rows=len(heldout))
    if name not in KNOWN:
        raise ConfigError(
            f"--benchmarks: unknown benchmark {name!r}; known: {', '.join(KNOWN)}, {HELDOUT} (of the run's [data]), "
            f"or NAME=FILE.jsonl, NAME={HUB}DATASET:SPLIT"
        )
    benchmark = KNOWN[name]
    if folder is not None:
        path = folder / f"{name}.jsonl"
        if not path.is_file():
            raise ConfigError(f"--data: {path}: no such file; it must hold {benchmark.title} as JSON lines")
        source, rows = benchmark.file, jsonl_rows(path)
    elif benchmark.hub_name:
        source, rows = benchmark.hub or benchmark.file, hub_rows(benchmark.hub_name)
    else:
        raise ConfigError(f"--benchmarks: {name}: no copy on the hub has its problems; give its folder by --data")
    problems = [_problem(source, row, place) for place, row in rows]
    if len(problems) != source.count:
        raise ConfigError(
            f"{name}: {len(problems)} rows, {benchmark.title} has {source.count}; "
            f"to evaluate on a part use --problems, on another set NAME=FILE.jsonl"
        )
    return _distinct(name, benchmark.title, problems, num_rows=len(problems))


def _other(name: str, where: str, data: DataSection) -> ProblemSet:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) or not where or name in (*KNOWN, HELDOUT):
        raise ConfigError(
            f"--benchmarks: {name}={where}: expected NAME=FILE.jsonl or NAME={HUB}DATASET, NAME a new one"
        )
    source = "hub" if where.startswith(HUB) else "jsonl"
    problems = load_set(data.model_copy(update={"source": source}), where.removeprefix(HUB))
    return _distinct(name, name, problems, num_rows=len(problems))


def _problem(source: Source, row: Row, place: str) -> Problem:
    for field in (*source.questions, source.answer):
        if field not in row:
            raise ConfigError(f"{place}: no field {field!r}; fields: {', '.join(row)}")
    question = " ".join(str(row[field]).strip() for field in source.questions)
    try:
        golds = source.golds(row[source.answer])
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"{place}: {source.answer}: {error}") from error
    if not question or not all(golds):
        raise ConfigError(f"{place}: {'the question' if not question else f'the answer in {source.answer!r}'} is empty")
    return Problem(question, golds)


def _distinct(name: str, title: str, problems: Iterable[Problem], *, num_rows: int) -> ProblemSet:
    unique: dict[str, Problem] = {}
    for problem in problems:
        unique.setdefault(problem.question, problem)
    return ProblemSet(name, title, tuple(unique.values()), num_rows)
