"""Agreement of this grader and of plain math-verify with the labelled corpus in tests/grading_corpus.

Run as `python -m benchmarks.grader_agreement [--half check|development|all] [--list-disagreements] [--markdown]`.
math-verify runs as its README recommends: the gold as a LaTeX expression, the full response, default options.
"Agree" counts correct against not correct, for both; "exact" counts our four verdicts one by one.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import math_verify

from services.grader.answer import Extraction, extract
from services.grader.equivalence import compare
from tests.corpus import HALVES, Case, half, load

COLUMNS = (
    "category",
    "cases",
    "ours agree %",
    "exact %",
    "wrongly accepted",
    "wrongly rejected",
    "math-verify agree %",
    "wrongly accepted",
    "wrongly rejected",
)


@dataclass(frozen=True)
class Graded:
    """A case with what each grader made of it."""

    case: Case
    verdict: str
    reference: bool


def grade(case: Case) -> str:
    """Return our verdict, in process."""
    answer = extract(case.response, mode=Extraction(case.extraction))
    if answer is None:
        return "no_answer"
    return str(compare(answer, case.golds, alarm_s=2).verdict)


def grade_reference(case: Case) -> bool:
    """Say whether plain math-verify accepts the response for any of the golds."""
    answer = math_verify.parse(case.response)
    return any(math_verify.verify(math_verify.parse(f"${gold}$"), answer) for gold in case.golds)


def summarise(name: str, graded: Sequence[Graded]) -> list[str]:
    """Return one line of the table."""
    right = [g.case.verdict == "correct" for g in graded]
    row = [name, str(len(graded))]
    for number, accepted in enumerate(([g.verdict == "correct" for g in graded], [g.reference for g in graded])):
        row.append(f"{100 * agreement(right, accepted):.1f}")
        if number == 0:
            row.append(f"{100 * agreement([g.case.verdict for g in graded], [g.verdict for g in graded]):.1f}")
        row.append(str(sum(a and not r for a, r in zip(accepted, right, strict=True))))
        row.append(str(sum(r and not a for a, r in zip(accepted, right, strict=True))))
    return row


def agreement(labels: Sequence[object], verdicts: Sequence[object]) -> float:
    """Return the share of equal entries."""
    return sum(a == b for a, b in zip(labels, verdicts, strict=True)) / len(labels)


def print_table(rows: Sequence[Sequence[str]], *, markdown: bool) -> None:
    """Print the rows under COLUMNS, padded or as Markdown."""
    if markdown:
        print(f"| {' | '.join(COLUMNS)} |\n|---|{'---:|' * (len(COLUMNS) - 1)}")
        for row in rows:
            print(f"| {' | '.join(row)} |")
        return
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    for row in (COLUMNS, *rows):
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *cells]))


def list_disagreements(cases: Sequence[Case]) -> None:
    """Print the cases on which our verdict is not the label."""
    for case in cases:
        if (verdict := grade(case)) != case.verdict:
            answer = extract(case.response, mode=Extraction(case.extraction))
            print(f"{case.category}:{case.line}: {verdict}, labelled {case.verdict} ({case.reason})")
            print(f"    gold {' | '.join(map(repr, case.golds))}, answer {answer!r}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Grade one half, or all, and print the table and one JSON line."""
    parser = argparse.ArgumentParser(prog="benchmarks.grader_agreement", description=__doc__.partition("\n")[0])
    parser.add_argument("--half", choices=[*HALVES, "all"], help="default all, with --list-disagreements development")
    parser.add_argument("--list-disagreements", action="store_true", help="ours, development half only")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args(arguments)
    wanted = options.half or ("development" if options.list_disagreements else "all")
    if options.list_disagreements and wanted != "development":
        sys.exit("--list-disagreements lists the development half only: nobody tunes on the check half")
    cases = [case for case in load() if wanted in ("all", half(case))]
    if options.list_disagreements:
        list_disagreements(cases)
        return

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it reports each alarm with a traceback
    graded = [Graded(case, grade(case), grade_reference(case)) for case in cases]
    categories = sorted({g.case.category for g in graded})
    rows = [summarise(name, [g for g in graded if g.case.category == name]) for name in categories]
    print_table([*rows, summarise("total", graded)], markdown=options.markdown)
    right = [g.case.verdict == "correct" for g in graded]
    ours = agreement(right, [g.verdict == "correct" for g in graded])
    reference = agreement(right, [g.reference for g in graded])
    result = {
        "benchmark": "grader_agreement",
        "case": wanted,
        "ours": round(ours, 4),
        "reference": round(reference, 4),
        "ratio": round(ours / reference, 4),
        "unit": "agreement",
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
