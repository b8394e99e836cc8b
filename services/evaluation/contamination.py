"""Are evaluation problems among those that are trained on? Exactly, or by a long run of words in common. Pure.

Two questions are the same when their words are: case, spaces, punctuation and the dollar signs of LaTeX do not count.
A run is GRAM words, as in the filters of DeepSeekMath's corpus; a question that is shorter can only be met exactly.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from services.contracts.problems import Problem

GRAM = 10
SHOWN = 3
WORD = re.compile(r"\\?[^\W_]+|[-+*/=<>^]")


@dataclass(frozen=True, slots=True)
class Overlap:
    """One benchmark against the training problems: how many of its questions are there."""

    benchmark: str
    num_problems: int
    exact: tuple[str, ...]  # questions
    similar: tuple[str, ...]  # not exact, but GRAM words in a row are the same as in some training question

    @property
    def num_found(self) -> int:
        """Questions that one should look at."""
        return len(self.exact) + len(self.similar)


def words(text: str) -> tuple[str, ...]:
    """What of a question counts."""
    return tuple(WORD.findall(text.casefold()))


def overlaps(train: Iterable[Problem], benchmarks: Mapping[str, Sequence[Problem]]) -> list[Overlap]:
    """Each benchmark against all training problems. One pass over these: memory is that of the benchmarks."""
    exact: dict[tuple[str, ...], list[tuple[str, int]]] = {}
    runs: dict[tuple[str, ...], list[tuple[str, int]]] = {}
    for name, problems in benchmarks.items():
        for i, problem in enumerate(problems):
            if not (said := words(problem.question)):
                continue
            exact.setdefault(said, []).append((name, i))
            for run in _runs(said):
                runs.setdefault(run, []).append((name, i))
    is_exact: set[tuple[str, int]] = set()
    is_similar: set[tuple[str, int]] = set()
    for problem in train:
        said = words(problem.question)
        is_exact.update(exact.get(said, ()))
        for run in _runs(said):
            is_similar.update(runs.get(run, ()))
    return [
        Overlap(
            name,
            len(problems),
            tuple(problem.question for i, problem in enumerate(problems) if (name, i) in is_exact),
            tuple(problem.question for i, problem in enumerate(problems) if (name, i) in is_similar - is_exact),
        )
        for name, problems in benchmarks.items()
    ]


def report(found: Iterable[Overlap], *, num_train: int, shown: int = SHOWN) -> list[str]:
    """Lines for people: one for each benchmark, and the beginnings of some questions that were met."""
    lines = []
    for overlap in found:
        share = f"{overlap.num_found} of {overlap.num_problems} problems"
        lines.append(
            f"contamination: {overlap.benchmark}: {share} are among the {num_train} training problems "
            f"({len(overlap.exact)} exactly, {len(overlap.similar)} by {GRAM} words in a row)"
            if overlap.num_found
            else f"contamination: {overlap.benchmark}: none of {overlap.num_problems} problems is among the "
            f"{num_train} training problems"
        )
        for kind, questions in (("exactly", overlap.exact), ("similar", overlap.similar)):
            lines += [f"  {kind}: {_short(question)}" for question in questions[:shown]]
    return lines


def _runs(said: tuple[str, ...]) -> Iterable[tuple[str, ...]]:
    return (said[i : i + GRAM] for i in range(len(said) - GRAM + 1))


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 100 else f"{flat[:97]}..."
