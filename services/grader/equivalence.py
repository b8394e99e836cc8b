"""Decide whether an answer equals a gold answer: exact after normalisation, then numeric, then symbolic.

Cheap and exact layers come first; a layer that understands both sides decides, and the tolerant ones below it are not
asked. Text is never evaluated (no eval, sympify or parse_expr): the last layer reads it with math-verify's LaTeX
parser. That may still hang or eat memory on hostile input, so this runs in a worker process which `pool` kills at the
deadline.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from math_verify.errors import TimeoutException

from services.contracts.wire import Verdict
from services.grader import expression, notations, readings, real_sets, units
from services.grader.answer import is_blank
from services.grader.expression import UnreadableError
from services.grader.normalise import normalise
from services.grader.numeric import decimal_equals, numbers_equal
from services.grader.readings import Collection, Relation

MAX_CHARS = 1_000  # of an answer that is compared by more than spelling
MAX_ELEMENTS = 24  # of a list that is compared by more than spelling

_RELATION = re.compile(r"[<>=]|\\(?:leq|geq|neq|cup|cap|in|mathbb|setminus|equiv)(?![A-Za-z])")
_SET_SIGN = re.compile(r"\\(?:cup|cap|setminus|in|notin|subset|subseteq)(?![A-Za-z])")
_ARC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_QUALIFIER = re.compile(
    r"[,;] ?(?:where )?[a-z](?:,[a-z])*\\in ?\\mathbb\{[ZNRQ]\}(?:\^\+)?$"
    r"|,? ?\\text\{(?:where|for|for all|with)[^{}]*\}.*$"
)


class Method(StrEnum):
    """The layer that decided."""

    EXACT = "exact"
    NUMERIC = "numeric"
    SYMBOLIC = "symbolic"


_DEPTH = (None, Method.EXACT, Method.NUMERIC, Method.SYMBOLIC)
# Of several gold answers none of which is met: one that could not be read says nothing, one undecided leaves it open.
_TELLS_LESS = (Verdict.UNPARSABLE_GOLD, Verdict.INCORRECT, Verdict.TIMEOUT)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A verdict and the layer behind it; no layer for a timeout or a gold answer that cannot be read."""

    verdict: Verdict
    method: Method | None


class UnparsableGoldError(ValueError):
    """The gold answer is empty or not mathematics that can be read."""


def compare(answer: str, golds: Sequence[str], *, alarm_s: int) -> Comparison:
    """Compare an extracted answer with every gold answer, one at least; equal to any of them is correct.

    alarm_s: whole seconds for each call of math-verify (a fractional one would make it answer "different" at once).
    Main thread only: math-verify's clock is SIGALRM. Raises MemoryError, which the caller counts.
    """
    normal = normalise(answer)
    if any(normal == normalise(gold) for gold in golds) and not is_blank(normal):
        return Comparison(Verdict.CORRECT, Method.EXACT)
    results = []
    for gold in golds:
        results.append(_compare_one(normalise(gold), normal, alarm_s))
        if results[-1].verdict is Verdict.CORRECT:
            return results[-1]
    return max(results, key=lambda result: (_TELLS_LESS.index(result.verdict), _DEPTH.index(result.method)))


def _compare_one(gold: str, answer: str, alarm_s: int) -> Comparison:
    try:
        equal, method = _Comparer(alarm_s).equal(gold, answer)
    except UnparsableGoldError:
        return Comparison(Verdict.UNPARSABLE_GOLD, None)
    except TimeoutException:
        return Comparison(Verdict.TIMEOUT, None)
    return Comparison(Verdict.CORRECT if equal else Verdict.INCORRECT, method)


class _Comparer:
    """One gold against one answer, both normalised. Methods return (equal, deciding layer)."""

    def __init__(self, alarm_s: int) -> None:
        self._alarm_s = alarm_s
        self._is_inside_set = False

    def equal(self, gold: str, answer: str) -> tuple[bool, Method]:
        """Compare two whole answers, or two elements of one. Raises UnparsableGoldError, TimeoutException."""
        if is_blank(gold):
            raise UnparsableGoldError("the gold answer is empty")
        if gold == answer:
            return True, Method.EXACT
        if is_blank(answer) or max(len(gold), len(answer)) > MAX_CHARS:
            return False, Method.EXACT
        gold, answer = _as_mathematics(gold), _as_mathematics(answer)
        if gold == answer:
            return True, Method.EXACT
        option = self._by_option(gold, answer)
        if option is not None:
            return option
        spelled = _by_spelling(gold, answer)
        if spelled is not None:
            return spelled, Method.EXACT
        if units.hedges(answer) and not units.hedges(gold):
            return False, Method.EXACT
        return self._by_quantity(gold, answer)

    def _by_option(self, gold: str, answer: str) -> tuple[bool, Method] | None:
        """Choices match by letter, a letter with its text also by its text; None when the gold is no choice."""
        gold_letters = readings.option_letters(gold)
        if gold_letters:
            return gold_letters == readings.option_letters(answer), Method.EXACT
        gold_option, answer_option = readings.option_letter(gold), readings.option_letter(answer)
        if gold_option is None:
            text = answer_option[1] if answer_option else ""  # "(B) 12" for 12
            return self.equal(gold, text) if text and readings.option_letter(text) is None else None
        letter, text = gold_option
        if answer_option is None:
            if text:
                return self.equal(text, answer)
            return None if len(gold) == 1 and readings.words(answer) is None else (False, Method.EXACT)
        if letter != answer_option[0] or (len(gold) == len(answer) == 1):
            return False, Method.EXACT
        if text and answer_option[1]:
            return self.equal(text, answer_option[1])
        return True, Method.EXACT

    def _by_quantity(self, gold: str, answer: str) -> tuple[bool, Method]:
        """Take labels, names and units away, convert units, and compare what is left by value."""
        gold, answer = readings.drop_label(gold), readings.drop_label(answer)
        if not re.search(r"[<>]", gold + answer):
            gold, answer = _QUALIFIER.sub("", gold), _QUALIFIER.sub("", answer)
        by_name = self._by_name(gold, answer)
        if by_name is not None:
            return by_name
        gold, answer = _drop_assignments(gold, answer)
        gold, answer = (_radians(side) if _ARC.search(side) else side for side in (gold, answer))
        if _is_list(gold) or _is_list(answer):
            return self._by_value(gold, answer)
        gold, answer, gold_unit, answer_unit = _without_units(units.total(gold), units.total(answer))
        factor = units.factor(gold_unit, answer_unit)
        if factor is None:
            return False, Method.EXACT
        if gold == answer and factor == 1:
            return True, Method.EXACT
        gold_number, answer_number = readings.number(gold), readings.number(answer)
        if factor != 1:
            answer_number = units.scaled_number(answer_number, factor, answer_unit)
            answer = units.scaled(answer, factor, answer_unit)
        if gold_number is not None and answer_number is not None:
            return numbers_equal(gold_number, answer_number), Method.NUMERIC
        return self._by_value(*_drop_assignments(gold, answer))

    def _by_value(self, gold: str, answer: str) -> tuple[bool, Method]:
        """Compare what has neither unit nor name: notations, real sets, matrices, collections, relations, values."""
        notation = notations.same(gold, answer)
        if notation is not None:
            return notation, Method.NUMERIC
        if real_sets.is_candidate(gold) or real_sets.is_candidate(answer):
            gold_set, answer_set = (real_sets.read(side, self._real_constant) for side in (gold, answer))
            if gold_set is not None and answer_set is not None:
                return real_sets.same(gold_set, answer_set), Method.SYMBOLIC
        elif ":" in gold or ":" in answer:
            return self._ratios(gold, answer), Method.SYMBOLIC
        gold_rows, answer_rows = readings.matrix(gold), readings.matrix(answer)
        if gold_rows and answer_rows:
            return self._matrices(gold_rows, answer_rows)
        if r"\begin" not in gold or r"\begin" not in answer:
            gold, answer = _vector_as_tuple(gold, gold_rows), _vector_as_tuple(answer, answer_rows)
        gold_parts, answer_parts = _collection(gold), _collection(answer)
        if gold_parts is not None or answer_parts is not None:
            return self._collections(gold_parts, answer_parts, gold, answer)
        if _SET_SIGN.search(gold):
            return False, Method.EXACT  # sets of letters are compared by spelling alone
        return self._statements(gold, answer)

    def _statements(self, gold: str, answer: str) -> tuple[bool, Method]:
        """Compare two relations, or two expressions."""
        gold_relation, answer_relation = readings.relation(gold), readings.relation(answer)
        if gold_relation and answer_relation:
            return self._relations(gold_relation, answer_relation), Method.SYMBOLIC
        if gold_relation or answer_relation:
            self._must_be_readable(gold)
            return False, Method.EXACT
        return self._expressions(gold, answer), Method.SYMBOLIC

    def _ratios(self, gold: str, answer: str) -> bool:
        """Proportional terms, one by one; a ratio of two is also its quotient."""
        golds, answers = (side.split(":") for side in (gold, answer))
        if {len(golds), len(answers)} == {1, 2}:
            golds, answers = (
                [rf"\frac{{{side[0]}}}{{{side[1]}}}"] if len(side) == 2 else side for side in (golds, answers)
            )
            return self._expressions(golds[0], answers[0])
        if len(golds) != len(answers):
            return False
        return all(
            self._expressions(rf"({term})\cdot({answers[0]})", rf"({other})\cdot({golds[0]})")
            for term, other in zip(golds[1:], answers[1:], strict=True)
        )

    def _collections(
        self, gold: Collection | None, answer: Collection | None, gold_text: str, answer_text: str
    ) -> tuple[bool, Method]:
        if not self._is_inside_set:  # {3} may be 3, but {{3}} is not {3}
            gold = gold or _singleton(gold_text, answer)
            answer = answer or _singleton(answer_text, gold)
        if gold is None or answer is None:
            if gold is None:
                self._must_be_readable(gold_text)
            return False, Method.EXACT
        if gold.kind == answer.kind == "set" and len(gold.elements) != len(answer.elements):
            gold, answer = _without_repeats(gold), _without_repeats(answer)
        if len(gold.elements) != len(answer.elements):
            return False, Method.EXACT
        if gold.brackets != answer.brackets and {gold.kind, answer.kind} & {"ordered", "union"}:
            return False, Method.EXACT
        if gold.kind == "ordered":
            return self._pairs(list(zip(gold.elements, answer.elements, strict=True)))
        was_inside, self._is_inside_set = self._is_inside_set, gold.kind == answer.kind == "set"
        found = self._unordered(list(gold.elements), list(answer.elements))
        self._is_inside_set = was_inside
        return found

    def _by_name(self, gold: str, answer: str) -> tuple[bool, Method] | None:
        """`x=1, y=2` in any order, as `(x,y)=(1,2)`, or as the tuple (1,2) in the order named; None without names."""
        golds, answers = readings.named_values(gold), readings.named_values(answer)
        if golds and answers:
            if golds.keys() != answers.keys():
                return False, Method.EXACT
            return self._pairs([(golds[name], answers[name]) for name in golds])
        for named, other, is_gold in ((golds, answer, True), (answers, gold, False)):
            parts = readings.collection(other) if named else None
            if named and parts and parts.kind == "ordered" and len(parts.elements) == len(named):
                pairs = zip(named.values(), parts.elements, strict=True)
                return self._pairs([pair if is_gold else pair[::-1] for pair in pairs])
        return None

    def _matrices(self, gold: readings.Rows, answer: readings.Rows) -> tuple[bool, Method]:
        if (len(gold), len(gold[0])) != (len(answer), len(answer[0])):
            return False, Method.EXACT
        cells = [pair for rows in zip(gold, answer, strict=True) for pair in zip(*rows, strict=True)]
        return self._pairs(cells)

    def _pairs(self, pairs: list[tuple[str, str]]) -> tuple[bool, Method]:
        if len(pairs) > MAX_ELEMENTS:
            return all(gold == answer for gold, answer in pairs), Method.EXACT
        deepest = Method.EXACT
        for gold, answer in pairs:
            equal, method = self.equal(gold, answer)
            deepest = max(deepest, method, key=_DEPTH.index)
            if not equal:
                return False, deepest
        return True, deepest

    def _unordered(self, golds: list[str], answers: list[str]) -> tuple[bool, Method]:
        for shared in [gold for gold in golds if gold in answers]:
            if shared in answers:
                golds.remove(shared)
                answers.remove(shared)
        if len(golds) > MAX_ELEMENTS:
            return False, Method.EXACT
        deepest = Method.EXACT
        for gold in golds:
            for index, answer in enumerate(answers):
                equal, method = self.equal(gold, answer)
                deepest = max(deepest, method, key=_DEPTH.index)
                if equal:
                    del answers[index]
                    break
            else:
                return False, deepest
        return True, deepest

    def _relations(self, gold: Relation, answer: Relation) -> bool:
        gold, answer = _rising(gold), _rising(answer)
        if len(gold.signs) != len(answer.signs):
            return False
        if gold.signs == answer.signs and all(
            self._expressions(*pair) for pair in zip(gold.sides, answer.sides, strict=True)
        ):
            return True
        if len(gold.signs) > 1:
            return False
        left, right = (self._parsed_difference(side, is_gold=side is gold) for side in (gold, answer))
        if left is None or right is None:
            return False
        ratio = expression.proportion(left, right)
        if ratio is None or gold.signs != answer.signs:
            return False
        return gold.signs[0] in ("=", "!=") or bool(ratio > 0)

    def _parsed_difference(self, relation: Relation, *, is_gold: bool) -> Any:
        left, right = (self._parse(side, is_gold=is_gold) for side in relation.sides)
        return None if left is None or right is None else expression.difference(left, right)

    def _expressions(self, gold: str, answer: str) -> bool:
        gold_tree, answer_tree = self._parse(gold, is_gold=True), self._parse(answer, is_gold=False)
        if gold_tree is None or answer_tree is None:
            return False
        for written, tree, is_gold in ((gold, answer_tree, True), (answer, gold_tree, False)):
            number, value = readings.number(written), expression.real_constant(tree)
            if number is not None and value is not None:
                rounded = decimal_equals(number, value, is_gold=is_gold)
                if rounded is not None:
                    return rounded
        return expression.equal(gold_tree, answer_tree, alarm_s=self._alarm_s)

    def _parse(self, text: str, *, is_gold: bool) -> expression.Tree | None:
        """The tree, None for an answer that cannot be read. Raises UnparsableGoldError for such a gold."""
        try:
            return expression.parse(text, alarm_s=self._alarm_s)
        except UnreadableError as error:
            if is_gold:
                raise UnparsableGoldError(str(error)) from error
            return None

    def _must_be_readable(self, gold: str) -> None:
        relation = readings.relation(gold)
        for side in relation.sides if relation else [gold]:
            self._parse(side, is_gold=True)

    def _real_constant(self, text: str) -> Any | None:
        tree = self._parse(text, is_gold=False)
        return expression.real_constant(tree) if tree is not None else None


def _as_mathematics(text: str) -> str:
    return readings.canonical(readings.spelled_number(readings.drop_phrase(text)))


def _by_spelling(gold: str, answer: str) -> bool | None:
    """Dates, clock times and words: never algebra. None when neither side is any of these."""
    moment = notations.same_moment(gold, answer)
    if moment is not None:
        return moment
    gold_words, answer_words = readings.words(gold), readings.words(answer)
    if gold_words is None or answer_words is None:
        return None if gold_words is answer_words else False
    return _word_list(gold_words) == _word_list(answer_words)


def _word_list(words: str) -> list[str]:
    parts = re.split(r"\s*[,;]\s*|\s+and\s+", re.sub(r"[.!']", "", words))
    return sorted(part.replace("-", " ") for part in parts if part)


def _drop_assignments(gold: str, answer: str) -> tuple[str, str]:
    """`x=5` is `5`; `y=5` is not `x=5`: names go when one side has none, or both have the same."""
    gold_pair, answer_pair = readings.assignment(gold), readings.assignment(answer)
    if gold_pair and answer_pair:
        return (gold_pair[1], answer_pair[1]) if gold_pair[0] == answer_pair[0] else (gold, answer)
    if gold_pair and not _RELATION.search(answer):
        return gold_pair[1], answer
    if answer_pair and not _RELATION.search(gold):
        return gold, answer_pair[1]
    return gold, answer


def _without_units(gold: str, answer: str) -> tuple[str, str, units.Unit | None, units.Unit | None]:
    """Both values and both units; a single letter is a unit where the other side has one."""
    gold_value, gold_unit = units.split(gold)
    answer_value, answer_unit = units.split(answer, expected=gold_unit is not None)
    if answer_unit is not None and gold_unit is None:
        gold_value, gold_unit = units.split(gold, expected=True)
    return gold_value, answer_value, gold_unit, answer_unit


def _radians(text: str) -> str:
    """Degrees inside trigonometric functions as multiples of pi/180."""
    text = re.sub(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?\^\\circ ?", r"(\\frac{\1\\pi}{180})", text)
    return re.sub(r"([A-Za-z]) ?\^\\circ ?", r"(\\frac{\1\\pi}{180})", text)


def _is_list(text: str) -> bool:
    found = readings.collection(text)
    return found is not None and found.kind == "list" and readings.number(units.split(text)[0]) is None


def _collection(text: str) -> Collection | None:
    """As `readings.collection`, and `a\\pm b` written out as its two values."""
    if text.count(r"\pm") == 1 and readings.collection(text) is None:
        return Collection("list", "", (text.replace(r"\pm", "+"), text.replace(r"\pm", "-")))
    found = readings.collection(text) or readings.union(text)
    if found is None or found.kind == "ordered" or r"\pm" not in text:
        return found
    elements: list[str] = []
    for element in found.elements:
        signs = ("+", "-") if element.count(r"\pm") == 1 else (r"\pm",)
        elements += [element.replace(r"\pm", sign) for sign in signs]
    return Collection(found.kind, found.brackets, tuple(elements))


def _vector_as_tuple(text: str, rows: readings.Rows | None) -> str:
    if rows is None or min(len(rows), len(rows[0])) > 1:
        return text
    return f"({','.join(cell for row in rows for cell in row)})"


def _without_repeats(parts: Collection) -> Collection:
    return Collection(parts.kind, parts.brackets, tuple(dict.fromkeys(parts.elements)))


def _singleton(text: str, other: Collection | None) -> Collection | None:
    """A single thing beside a set or list of one: `\\{3\\}` for 3."""
    if other is None or other.kind == "ordered" or len(other.elements) != 1:
        return None
    return Collection("list", "", (text,))


def _rising(chain: Relation) -> Relation:
    """The same chain with < and <= only, where it runs one way."""
    if chain.signs[0][0] != ">" or not readings.is_increasing(chain.signs):
        return chain
    return Relation(chain.sides[::-1], tuple(sign.replace(">", "<") for sign in chain.signs[::-1]))
