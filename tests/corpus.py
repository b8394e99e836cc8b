"""The labelled grading corpus, read from `tests/grading_corpus/*.jsonl`; its README describes the format."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "grading_corpus"
VERDICTS = ("correct", "incorrect", "no_answer", "unparsable_gold")
EXTRACTIONS = ("boxed", "auto")
HALVES = ("development", "check")

_REQUIRED = {"gold", "response", "verdict", "reason"}
_OPTIONAL = {"extraction"}


@dataclass(frozen=True)
class Case:
    """One labelled response; `line` counts from 1 in the file of its category."""

    category: str
    line: int
    golds: tuple[str, ...]
    response: str
    extraction: str
    verdict: str
    reason: str


def load(folder: Path = FOLDER) -> list[Case]:
    """Read every case, ordered by category and line; ValueError naming file:line for a bad line."""
    cases = []
    for path in sorted(folder.glob("*.jsonl")):
        # Not splitlines(): it would also split at U+2028 and its like inside a string.
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        for number, text in enumerate(lines, start=1):
            try:
                cases.append(_parse(path.stem, number, text))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
    return cases


def half(case: Case) -> str:
    """Say which half the case is in; the labels, the category and its place in the file do not matter."""
    content = json.dumps([case.golds, case.response, case.extraction])
    return HALVES[hashlib.sha256(content.encode()).digest()[0] % 2]


def _parse(category: str, number: int, text: str) -> Case:
    entry = json.loads(text)
    if not isinstance(entry, dict):
        raise ValueError("not a JSON object")
    if missing := sorted(_REQUIRED - entry.keys()):
        raise ValueError(f"missing {', '.join(missing)}")
    if unknown := sorted(entry.keys() - _REQUIRED - _OPTIONAL):
        raise ValueError(f"unknown {', '.join(unknown)}")
    golds = entry["gold"] if isinstance(entry["gold"], list) else [entry["gold"]]
    if not golds or not all(isinstance(gold, str) for gold in golds):
        raise ValueError("gold is neither a string nor a non-empty list of strings")
    if not isinstance(entry["response"], str):
        raise ValueError("response is not a string")
    extraction = entry.get("extraction", "boxed")
    if extraction not in EXTRACTIONS:
        raise ValueError(f"extraction is not one of {', '.join(EXTRACTIONS)}")
    if entry["verdict"] not in VERDICTS:
        raise ValueError(f"verdict is not one of {', '.join(VERDICTS)}")
    if not isinstance(entry["reason"], str) or not entry["reason"].strip():
        raise ValueError("reason is empty")
    return Case(category, number, tuple(golds), entry["response"], extraction, entry["verdict"], entry["reason"])
