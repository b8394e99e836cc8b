"""Finished dialogues as text, for people: which ones, and how they look."""

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from services.evaluation.journal import CORRECT, Dialogue

MAX_CHARS = 4000  # of one attempt


@dataclass(frozen=True, slots=True)
class Filter:
    """Which dialogues are wanted; None and False: any."""

    benchmark: str | None = None
    is_wrong: bool = False  # not solved in the end
    is_solved: bool = False
    attempts_made: int | None = None
    max_attempts: int | None = None
    problem: str | None = None  # beginning of its id, or words of its question

    def __call__(self, dialogue: Dialogue) -> bool:
        """Whether it is wanted."""
        return (
            self.benchmark in (None, dialogue.benchmark)
            and not (self.is_wrong and dialogue.is_solved)
            and not (self.is_solved and not dialogue.is_solved)
            and self.attempts_made in (None, len(dialogue.attempts))
            and self.max_attempts in (None, dialogue.max_attempts)
            and (self.problem is None or _is_about(dialogue, self.problem))
        )


def _is_about(dialogue: Dialogue, words: str) -> bool:
    return dialogue.problem_id.startswith(words) or words.casefold() in dialogue.question.casefold()


def select(dialogues: Iterable[Dialogue], wanted: Callable[[Dialogue], bool]) -> list[Dialogue]:
    """Those that are wanted, in the order of benchmark, problem, N and seed."""
    return sorted(filter(wanted, dialogues), key=lambda dialogue: dialogue.key)


def readable(dialogue: Dialogue) -> str:
    """One dialogue. Nothing in it can command a terminal."""
    return "\n".join(_lines(dialogue))


def count(shown: Sequence[Dialogue], found: int, total: int) -> str:
    """The last line."""
    return f"{len(shown)} of {found} dialogues that match, {total} in all"


def _lines(dialogue: Dialogue) -> Iterator[str]:
    head = f"{dialogue.benchmark} {dialogue.problem_id}, {_allowed(dialogue.max_attempts)}, seed {dialogue.seed_index}"
    yield f"=== {head}, temperature {dialogue.temperature:g}"
    yield plain(dialogue.question)
    yield f"right: {plain(' or '.join(dialogue.gold))}"
    if dialogue.refused:
        yield f"refused: {plain(dialogue.refused)}"
    for number, attempt in enumerate(dialogue.attempts, start=1):
        said = "" if attempt.extracted is None else f": {plain(attempt.extracted)}"
        mark = "+" if attempt.verdict == CORRECT else "-"
        yield f"--- attempt {number}: {mark} {attempt.verdict}{said} ({attempt.num_tokens} tokens)"
        cut = len(attempt.text) - MAX_CHARS
        yield plain(attempt.text[:MAX_CHARS]) + (f" [{cut} characters more]" if cut > 0 else "")
    yield ""


def _allowed(attempts: int) -> str:
    return f"{attempts} attempt{'s' * (attempts > 1)} allowed"


def plain(text: str) -> str:
    """Without control characters, but for line breaks and tabs."""
    return "".join(c if c in "\n\t" or not unicodedata.category(c).startswith("C") else "\N{REPLACEMENT CHARACTER}"
                   for c in text.replace("\r\n", "\n"))  # fmt: skip
