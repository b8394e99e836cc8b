"""`multiattempt grade`: one response, or a file of them, by a running grader or by one in this process.

A mistake in a line of a file is one line on standard error, and the other lines are graded all the same. Memory does
not grow with the file: lines are read, graded and written a chunk at a time.
"""

import asyncio
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from services.contracts.config import ConfigError
from services.grader.client import Grade, GraderClient, GraderError, Question

EXIT_GRADED, EXIT_BAD, EXIT_NOT_CORRECT, EXIT_INTERRUPTED = 0, 1, 3, 130
STDIN = "-"
MAX_LINE_BYTES = 8 * 2**20
CHUNK_LINES, CHUNK_BYTES = 2_048, 32 * 2**20  # graded at once
DEADLINE_S, FILE_DEADLINE_S = 10.0, 60.0  # to wait for a grader that does not answer; somebody watches the first

Extraction = Literal["boxed", "auto"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GradeOptions:
    """What was asked for on the command line."""

    response: str | None
    gold: list[str] | None
    file: str | None
    output: Path | None
    extraction: Extraction
    url: str | None
    workers: int | None
    is_json: bool
    is_check: bool


class _Line(NamedTuple):
    number: int  # from 1
    end: int  # bytes of the file up to and with this line
    question: Question


class BadLine(ValueError):
    """A line that cannot be graded: what is wrong, what to do."""


def run_grade(options: GradeOptions) -> int:
    """Grade and print. Returns 0 when all was graded, 1 after a bad line or without a grader, 130 stopped.

    With `is_check` 3 when all was graded but not all was correct. Raises ConfigError.
    """
    _check(options)
    try:
        with ExitStack() as stack:
            runner = stack.enter_context(asyncio.Runner())
            grader = stack.enter_context(_grader(runner, options))
            if options.file is None:
                return _one(runner, grader, options)
            return _many(runner, grader, options, options.file)
    except GraderError as error:
        print(f"multiattempt: error: {error}", file=sys.stderr)
        return EXIT_BAD
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _check(options: GradeOptions) -> None:
    if (options.response is None) == (options.file is None):
        raise ConfigError('give a response or --file: multiattempt grade "so it is 1/2" --gold 0.5')
    if options.response is not None and not options.gold:
        raise ConfigError("--gold is missing: the right answer (repeat it for several, of which any is right)")
    if options.file is not None and options.gold:
        raise ConfigError("--gold is for a single response: in a file every line has its own `gold`")
    if options.file is None and options.output is not None:
        raise ConfigError("--output goes with --file")
    if options.url and options.workers:
        raise ConfigError("--workers is for grading in this process: a running grader (--url) has its own")


@contextmanager
def _grader(runner: asyncio.Runner, options: GradeOptions) -> Iterator[GraderClient]:
    """A client of the running grader, or of a grader application in this process."""
    deadline_s = DEADLINE_S if options.file is None else FILE_DEADLINE_S
    if options.url:
        try:
            client = GraderClient(options.url, deadline_s=deadline_s)
        except ValueError as error:
            raise ConfigError(f"--url: {error}") from error
        try:
            yield client
        finally:
            runner.run(client.close())
        return
    with _local(runner, options) as transport:
        client = GraderClient("http://this-process", token="", deadline_s=deadline_s, transport=transport)
        try:
            yield client
        finally:
            runner.run(client.close())


@contextmanager
def _local(runner: asyncio.Runner, options: GradeOptions) -> Iterator[Any]:
    """The grader's application with its workers, without a socket: an httpx transport into it."""
    import httpx
    from pydantic import ValidationError

    from services.contracts.settings import GraderSection

    try:
        from services.grader.app import create_app
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"grading here needs the grader's libraries ({error.name} is missing): pip install "
            f"'multi-attempt-rl[grader]', or name a running grader with --url"
        ) from error
    workers = options.workers if options.workers is not None else 1 if options.file is None else os.cpu_count() or 1
    try:
        app = create_app(GraderSection(workers=workers))
    except ValidationError as error:
        raise ConfigError(f"--workers: {error.errors()[0]['msg']}, got {workers}") from error
    logging.getLogger("services.grader").setLevel(logging.ERROR)  # a killed worker is told by its verdict
    life = app.router.lifespan_context(app)
    runner.run(life.__aenter__())
    try:
        yield httpx.ASGITransport(app)
    finally:
        runner.run(life.__aexit__(None, None, None))


def _one(runner: asyncio.Runner, grader: GraderClient, options: GradeOptions) -> int:
    assert options.response is not None and options.gold
    grade = runner.run(grader.grade(options.response, options.gold, extraction=options.extraction))
    if options.is_json:
        print(json.dumps(as_json(grade)))
    else:
        print(f"verdict    {grade.verdict}")
        print(f"extracted  {'-' if grade.extracted is None else grade.extracted}")
        print(f"method     {grade.method or '-'}")
        print(f"time       {grade.elapsed_ms:.1f} ms")
    return EXIT_NOT_CORRECT if options.is_check and not grade.correct else EXIT_GRADED


def _many(runner: asyncio.Runner, grader: GraderClient, options: GradeOptions, name: str) -> int:
    summary = Summary()
    with ExitStack() as stack:
        source = stack.enter_context(_source(name))
        output = stack.enter_context(_output(options.output, name)) if options.output else None
        advance, say = stack.enter_context(_progress(name))

        def bad(number: int, error: BadLine) -> None:
            summary.num_bad += 1
            say(f"{'standard input' if name == STDIN else name}:{number}: {error}")

        for lines in read_chunks(source, options.extraction, bad):
            ends = [line.end for line in lines]

            def show(num_done: int, ends: list[int] = ends) -> None:
                advance(ends[num_done - 1])

            grades = runner.run(grader.grade_many([line.question for line in lines], on_progress=show))
            for line, grade in zip(lines, grades, strict=True):
                summary.add(grade)
                if output:
                    output.write(json.dumps({"line": line.number, **as_json(grade)}) + "\n")
    summary.show(is_json=options.is_json)
    if summary.num_bad:
        return EXIT_BAD
    return EXIT_NOT_CORRECT if options.is_check and summary.num_correct < summary.num_graded else EXIT_GRADED


def as_json(grade: Grade) -> dict[str, object]:
    """The grade with the names of the HTTP interface."""
    return {
        "id": grade.id,
        "correct": grade.correct,
        "verdict": grade.verdict.value,
        "extracted": grade.extracted,
        "method": grade.method,
        "elapsed_ms": grade.elapsed_ms,
        "cached": grade.cached,
    }


def read_chunks(source: BinaryIO, extraction: Extraction, bad: Callable[[int, BadLine], None]) -> Iterator[list[_Line]]:
    """The good lines, a bounded number and size at a time; `bad` is told of the others. Empty lines are skipped."""
    chunk: list[_Line] = []
    number = position = num_bytes = 0
    while text := source.readline(MAX_LINE_BYTES + 1):
        number, position = number + 1, position + len(text)
        rest = text
        while not rest.endswith(b"\n") and len(rest) > MAX_LINE_BYTES:  # a long line: over its rest
            rest = source.readline(MAX_LINE_BYTES + 1)
            position += len(rest)
        try:
            if text.strip():
                chunk.append(_Line(number, position, parse_line(text, extraction)))
                num_bytes += len(text)
        except BadLine as error:
            bad(number, error)
        if len(chunk) == CHUNK_LINES or num_bytes > CHUNK_BYTES:
            yield chunk
            chunk, num_bytes = [], 0
    if chunk:
        yield chunk


def parse_line(text: bytes, extraction: Extraction) -> Question:
    """The question in a line; `extraction` where it names none. Fields it does not know are passed over."""
    if len(text) > MAX_LINE_BYTES:
        raise BadLine(f"the line has more than {MAX_LINE_BYTES} bytes; cut the response to its end")
    try:
        fields = json.loads(text)
    except UnicodeDecodeError as error:
        raise BadLine("not UTF-8; convert the file, for example with iconv") from error
    except json.JSONDecodeError as error:
        raise BadLine(f"not JSON ({error.msg}, column {error.colno}); one object a line is wanted") from error
    except (ValueError, RecursionError) as error:  # an endless number, endless nesting
        raise BadLine(f"not JSON that can be read ({error}); mend the line") from error
    if not isinstance(fields, dict):
        raise BadLine('not an object; write {"response": "...", "gold": "..."}')
    response, id = fields.get("response"), fields.get("id")
    if not isinstance(response, str):
        raise BadLine(f"`response` {_fault(fields, 'response')}; the model's whole output is wanted, as a string")
    given = fields.get("gold")
    golds = given if isinstance(given, list) else [given]
    if not golds or not all(isinstance(gold, str | int | float) for gold in golds):
        raise BadLine(f"`gold` {_fault(fields, 'gold')}; the right answer is wanted, a string or a list of strings")
    mode = fields.get("extraction", extraction)
    if mode not in ("boxed", "auto"):
        raise BadLine(f"`extraction` is {json.dumps(mode)[:40]}; write boxed or auto, or leave it out")
    if not isinstance(id, str | int | None):
        raise BadLine(f"`id` {_fault(fields, 'id')}; a string is wanted")
    return Question(response, [str(gold) for gold in golds], mode, None if id is None else str(id))


def _fault(fields: dict[str, Any], name: str) -> str:
    return f"is {json.dumps(fields[name])[:40]}" if name in fields else "is missing"


@contextmanager
def _source(name: str) -> Iterator[BinaryIO]:
    if name == STDIN:
        yield sys.stdin.buffer
        return
    try:
        file = Path(name).open("rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise ConfigError(
            f"--file {name}: {error.strerror}; a file of JSON lines is wanted, - is standard input"
        ) from error
    with file:
        yield file


@contextmanager
def _output(path: Path, source: str) -> Iterator[TextIO]:
    if source != STDIN and path.exists() and path.samefile(source):
        raise ConfigError(f"--output {path} is the file to be graded: choose another")
    try:
        file = path.open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {path}: {error.strerror}") from error
    with file:
        yield file


@contextmanager
def _progress(name: str) -> Iterator[tuple[Callable[[int], None], Callable[[str], None]]]:
    """A bar on a terminal's standard error, over the file's bytes; functions that move it, and write a line above."""
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("grading"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=None if name == STDIN else Path(name).stat().st_size)
        yield (
            lambda position: progress.update(bar, completed=position),
            lambda line: console.print(Text(line), soft_wrap=True),
        )


@dataclass(slots=True)
class _Tally:
    num: int = 0
    total_ms: float = 0.0
    max_ms: float = 0.0


@dataclass(slots=True)
class Summary:
    """Counts and times by verdict and method."""

    num_bad: int = 0
    tallies: dict[tuple[str, str | None], _Tally] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def add(self, grade: Grade) -> None:
        """Count one grade."""
        tally = self.tallies.setdefault((grade.verdict.value, grade.method), _Tally())
        tally.num += 1
        tally.total_ms += grade.elapsed_ms
        tally.max_ms = max(tally.max_ms, grade.elapsed_ms)

    @property
    def num_graded(self) -> int:
        """Responses that have a verdict."""
        return sum(tally.num for tally in self.tallies.values())

    @property
    def num_correct(self) -> int:
        """Those whose verdict is correct."""
        return sum(tally.num for (verdict, _), tally in self.tallies.items() if verdict == "correct")

    def show(self, *, is_json: bool) -> None:
        """Print it on standard output: a table for people, or one JSON object."""
        seconds = time.monotonic() - self.started
        rows = sorted(self.tallies.items(), key=lambda row: (row[0][0], row[0][1] or ""))
        if is_json:
            parts = [
                {"verdict": verdict, "method": method, "num": t.num, "mean_ms": t.total_ms / t.num, "max_ms": t.max_ms}
                for (verdict, method), t in rows
            ]
            counts = {"num_graded": self.num_graded, "num_correct": self.num_correct, "num_bad_lines": self.num_bad}
            print(json.dumps({**counts, "seconds": round(seconds, 3), "parts": parts}))
            return
        table = Table("verdict", "method", box=None, pad_edge=False)
        for name in ("responses", "share", "mean ms", "max ms"):
            table.add_column(name, justify="right")
        for (verdict, method), tally in rows:
            share = f"{tally.num / self.num_graded:.1%}"
            mean, longest = f"{tally.total_ms / tally.num:.2f}", f"{tally.max_ms:.1f}"
            table.add_row(verdict, method or "-", f"{tally.num:,}", share, mean, longest)
        console = Console(highlight=False, soft_wrap=True)
        if rows:
            console.print(table)
        console.print(
            f"{self.num_correct:,} of {self.num_graded:,} correct"
            + (f" ({self.num_correct / self.num_graded:.1%})" if rows else "")
            + f", {self.num_bad:,} bad line{'s' * (self.num_bad != 1)}, {seconds:.1f} s"
            + (f", {self.num_graded / seconds:,.0f} responses/s" if rows else "")
        )
