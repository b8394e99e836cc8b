"""Decide whether an answer equals a gold answer: exact after normalisation, then numeric, then symbolic.

Cheap and exact layers come first; a layer that understands both sides decides, and the tolerant ones below it are not
asked. Text is never evaluated (no eval, sympify or parse_expr): the last layer is math-verify's LaTeX parser. It may
still hang or eat memory on hostile input, so this runs in `worker_process`, which `pool` kills at the deadline.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from math_verify.errors import TimeoutException
from math_verify.utils import timeout

from services.contracts.wire import Verdict
from services.grader import normalise as text_of
from services.grader.answer import is_blank
from services.grader.normalise import Collection, Number

MAX_TOLERANT_CHARS = 1_000  # longer answers are compared exactly only
MAX_NESTING = 50
MAX_DIGITS = 1_000  # of one run
MAX_POWER = 10_000  # literal exponents, factorials and binomials
MAX_EXPANSION = 40  # exponent of a bracket that holds letters
MAX_ELEMENTS = 24  # of a list that is compared by more than spelling

# units=False: math-verify's own unit stripping takes 2t for 2s.
_PARSER = (
    LatexExtractionConfig(
        boxed_match_priority=0,
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last", equations=False
        ),
    ),
)
_ASSIGNMENT = re.compile(r"([A-Za-z](?:_[A-Za-z0-9]|\([a-z]\))?|\\[a-z]+)(?:=|\\in(?![a-z])\s*)(?!=)([^=<>]*)")
_RELATION = re.compile(r"[<>=]|\\(?:leq|geq|neq|cup|cap|in|mathbb|setminus)(?![A-Za-z])|\\begin")
_BASE = re.compile(r"([0-9A-F]{1,200})_\{?([0-9]{1,2})\}?")
_RATIO = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?):([0-9]{1,18}(?:\.[0-9]{1,9})?)")
_EXACT_ONLY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}|[0-9]{1,2}:[0-9]{2}(?::[0-9]{2})?(?:[ap]\.?m\.?)?", re.IGNORECASE)
_TRIGONOMETRIC_DEGREES = re.compile(
    r"(\\(?:sin|cos|tan|cot|sec|csc))(\^2)?\s*[({]?([0-9]{1,9}(?:\.[0-9]{1,9})?)\^\\circ[)}]?"
)
_SIX_PLACES = 10**-6  # a decimal for a value that has no finite one is right from six correct places on


class Method(StrEnum):
    """The layer that decided."""

    EXACT = "exact"
    NUMERIC = "numeric"
    SYMBOLIC = "symbolic"


_DEPTH = (Method.EXACT, Method.NUMERIC, Method.SYMBOLIC)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A verdict and the layer behind it; no layer for a timeout or a gold answer that cannot be read."""

    verdict: Verdict
    method: Method | None


class UnparsableGoldError(ValueError):
    """The gold answer is empty or not mathematics that can be read."""


def compare(answer: str, golds: Sequence[str], *, alarm_s: int) -> Comparison:
    """Compare an extracted answer with every gold answer; equal to any of them is correct.

    alarm_s: whole seconds for each call of math-verify (a fractional one would make it answer "different" at once).
    Main thread only: math-verify's clock is SIGALRM. Raises MemoryError, which the caller counts.
    """
    results = []
    try:
        for gold in golds:
            results.append(_compare_one(gold, answer, alarm_s))
            if results[-1].verdict is Verdict.CORRECT:
                return results[-1]
    except TimeoutException:
        return Comparison(Verdict.TIMEOUT, None)
    readable = [result for result in results if result.verdict is not Verdict.UNPARSABLE_GOLD]
    if not readable:
        return Comparison(Verdict.UNPARSABLE_GOLD, None)
    return max(readable, key=lambda result: _DEPTH.index(result.method or Method.EXACT))


def _compare_one(gold: str, answer: str, alarm_s: int) -> Comparison:
    try:
        equal, method = _Comparer(alarm_s).equal(text_of.normalise(gold), text_of.normalise(answer))
    except UnparsableGoldError:
        return Comparison(Verdict.UNPARSABLE_GOLD, None)
    return Comparison(Verdict.CORRECT if equal else Verdict.INCORRECT, method)


def numbers_equal(gold: Number, answer: Number) -> bool:
    """Whether two written numbers are the same: exactly, or to six places where no finite decimal exists.

    A percent sign on one side may mean either reading (`50%` is `50` or `0.5`); none on either side never does.
    """
    if gold.is_percent == answer.is_percent:
        return _values_equal(gold, answer, Fraction(1), Fraction(1))
    if gold.is_percent:
        return any(_values_equal(gold, answer, scale, Fraction(1)) for scale in (Fraction(1), Fraction(1, 100)))
    return any(_values_equal(gold, answer, Fraction(1), scale) for scale in (Fraction(1), Fraction(1, 100)))


def is_bounded(text: str) -> bool:
    """Whether a text is small enough, in every way that costs, to hand to the symbolic layer."""
    if len(text) > MAX_TOLERANT_CHARS or re.search(rf"[0-9]{{{MAX_DIGITS}}}", text):
        return False
    depth = deepest = 0
    for bracket in re.findall(r"[(\[{)\]}]", text):
        depth += 1 if bracket in "([{" else -1
        deepest = max(deepest, depth)
    if deepest > MAX_NESTING or re.search(r"![\s)}\]]*!", text):
        return False
    sizes = re.findall(r"\^\{?-?([0-9]+)|([0-9]+)\s*!|\\binom\{([0-9]+)", text)
    if any(len(size) > 6 or int(size) > MAX_POWER for found in sizes for size in found if size):
        return False
    expansions = re.findall(r"[)}\]]\^\{?([0-9]+)", text)
    if re.search(r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])", text) and any(int(e) > MAX_EXPANSION for e in expansions):
        return False
    return not any(_is_tower(text, match.end()) for match in re.finditer(r"\^\{", text))


class _Comparer:
    """One gold against one answer, both normalised. Methods return (equal, deciding layer)."""

    def __init__(self, alarm_s: int) -> None:
        self._alarm_s = alarm_s

    def equal(self, gold: str, answer: str) -> tuple[bool, Method]:
        if is_blank(gold):
            raise UnparsableGoldError("the gold answer is empty")
        if gold == answer:
            return True, Method.EXACT
        if is_blank(answer):
            return False, Method.EXACT
        spelled = self._by_spelling(gold, answer)
        if spelled is not None:
            return spelled, Method.EXACT
        return self._by_value(gold, answer)

    def _by_spelling(self, gold: str, answer: str) -> bool | None:
        """Options, words, dates and clock times: never algebra. None when the gold is none of these."""
        option = text_of.option_letter(gold)
        if option is not None and len(gold) <= len(r"\textbf{(A)}"):
            return option == text_of.option_letter(answer)
        gold_words, answer_words = text_of.words(gold), text_of.words(answer)
        if gold_words is not None:
            return gold_words == answer_words
        if answer_words is not None:
            return False
        if _EXACT_ONLY.fullmatch(gold) or _EXACT_ONLY.fullmatch(answer):
            return False
        return None

    def _by_value(self, gold: str, answer: str) -> tuple[bool, Method]:
        gold, answer = (_TRIGONOMETRIC_DEGREES.sub(r"\1\2{(\\frac{\3\\pi}{180})}", side) for side in (gold, answer))
        (gold, gold_unit), (answer, answer_unit) = text_of.split_unit(gold), text_of.split_unit(answer)
        if gold_unit and answer_unit and gold_unit != answer_unit:
            return False, Method.EXACT
        gold, answer = _drop_assignments(gold, answer)
        if gold == answer:
            return True, Method.EXACT
        gold_number, answer_number = text_of.number(gold), text_of.number(answer)
        if gold_number is not None and answer_number is not None:
            return numbers_equal(gold_number, answer_number), Method.NUMERIC
        notation = _by_notation(gold, answer)
        if notation is not None:
            return notation, Method.NUMERIC
        if not is_bounded(gold) or not is_bounded(answer):
            return False, Method.EXACT
        gold_parts, answer_parts = _collection(gold), _collection(answer)
        if gold_parts is not None and answer_parts is not None:
            return self._collections(gold_parts, answer_parts)
        if gold_parts is not None and not _RELATION.search(answer):
            return False, Method.EXACT
        if answer_parts is not None and not _RELATION.search(gold):
            return False, Method.EXACT
        return self._symbolic(gold, answer)

    def _collections(self, gold: Collection, answer: Collection) -> tuple[bool, Method]:
        if len(gold.elements) != len(answer.elements):
            return False, Method.EXACT
        if gold.kind == "ordered" or answer.kind == "ordered":
            if gold.brackets != answer.brackets:
                return False, Method.EXACT
            return self._pairs(list(zip(gold.elements, answer.elements, strict=True)))
        return self._unordered(list(gold.elements), list(answer.elements))

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

    def _symbolic(self, gold: str, answer: str) -> tuple[bool, Method]:
        gold, answer = _separate_cases(gold, answer)
        gold_parsed = self._parse(gold)
        if gold_parsed is None:
            raise UnparsableGoldError(f"math-verify cannot read the gold answer {gold[:80]!r}")
        answer_parsed = self._parse(answer)
        if answer_parsed is None:
            return False, Method.SYMBOLIC
        try:
            written = text_of.number(answer) or text_of.number(gold)
            constants = timeout(self._alarm_s)(_constants_equal)(gold_parsed, answer_parsed, written)
            if constants is not None:
                return constants, Method.SYMBOLIC
            same = verify(
                [gold_parsed], [answer_parsed], strict=True, timeout_seconds=self._alarm_s, raise_on_error=True
            )
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001 - sympy raises anything at all; an answer it cannot compare is not accepted
            return False, Method.SYMBOLIC
        return bool(same), Method.SYMBOLIC

    def _parse(self, text: str) -> sympy.Basic | sympy.MatrixBase | None:
        text = text.replace(r"^\circ", "")
        try:
            found = parse(
                rf"\boxed{{{text}}}",
                extraction_config=_PARSER,
                fallback_mode="no_fallback",
                parsing_timeout=self._alarm_s,
                raise_on_error=True,
            )
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001 - the parsers raise anything at all on text that is not mathematics
            return None
        expression = found[0] if found else None
        return expression if isinstance(expression, sympy.Basic | sympy.MatrixBase) else None


def _values_equal(gold: Number, answer: Number, gold_scale: Fraction, answer_scale: Fraction) -> bool:
    left, right = gold.value * gold_scale, answer.value * answer_scale
    if left == right:
        return True
    for decimal, value, other in ((gold, left, right), (answer, right, left)):
        if decimal.decimals >= 6 and abs(other) >= Fraction(1, 10_000) and not _is_finite_decimal(other):
            return abs(value - other) < Fraction(1, 10**6)
    return False


def _is_finite_decimal(value: Fraction) -> bool:
    denominator = value.denominator
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    return denominator == 1


def _is_tower(text: str, start: int) -> bool:
    r"""Whether the exponent group that starts here holds a numeric power of more than `MAX_POWER`: 9^{9^9}."""
    depth, end = 1, start
    while end < len(text) and depth:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    group = text[start : end - 1]
    for base, power in re.findall(r"([0-9]+)\}?\^\{?([0-9]+)", group):
        if len(base) > 4 or len(power) > 2 or int(base) ** int(power) > MAX_POWER:
            return True
    return group.count("^") > 1 or "!" in group


def _drop_assignments(gold: str, answer: str) -> tuple[str, str]:
    """`x=5` is `5`; `y=5` is not `x=5`: names go when one side has none, or both have the same."""
    gold_match, answer_match = _ASSIGNMENT.fullmatch(gold), _ASSIGNMENT.fullmatch(answer)
    if gold_match and answer_match:
        same = gold_match.group(1) == answer_match.group(1)
        return (gold_match.group(2), answer_match.group(2)) if same else (gold, answer)
    if gold_match and not _RELATION.search(answer):
        return gold_match.group(2), answer
    if answer_match and not _RELATION.search(gold):
        return gold, answer_match.group(2)
    return gold, answer


def _by_notation(gold: str, answer: str) -> bool | None:
    """Numbers in a base and ratios; None when neither side is one."""
    gold_base, answer_base = _BASE.fullmatch(gold), _BASE.fullmatch(answer)
    if gold_base or answer_base:
        if gold_base and answer_base:
            left, right = (_in_base(*match.groups()) for match in (gold_base, answer_base))
            return left is not None and left == right
        digits = (gold_base or answer_base).group(1)  # type: ignore[union-attr]
        return digits == (answer if gold_base else gold)
    gold_ratio, answer_ratio = _RATIO.fullmatch(gold), _RATIO.fullmatch(answer)
    if gold_ratio and answer_ratio:
        (a, b), (c, d) = (map(Fraction, match.groups()) for match in (gold_ratio, answer_ratio))
        return a * d == b * c
    return None


def _in_base(digits: str, base: str) -> int | None:
    try:
        return int(digits, int(base)) if int(base) >= 2 else None
    except ValueError:
        return None


def _collection(text: str) -> Collection | None:
    """As `normalise.collection`, and `a\\pm b` written out as its two values."""
    if text.count(r"\pm") == 1 and text_of.collection(text) is None:
        return Collection("list", "", (text.replace(r"\pm", "+"), text.replace(r"\pm", "-")))
    found = text_of.collection(text)
    if found is None or found.kind == "ordered" or r"\pm" not in text:
        return found
    elements: list[str] = []
    for element in found.elements:
        signs = ("+", "-") if element.count(r"\pm") == 1 else (r"\pm",)
        elements += [element.replace(r"\pm", sign) for sign in signs]
    return Collection(found.kind, found.brackets, tuple(elements))


def _separate_cases(gold: str, answer: str) -> tuple[str, str]:
    """math-verify lower-cases symbols: where R and r both occur, R becomes a Greek letter that does not."""
    letters = re.compile(r"\\[A-Za-z]+|[A-Za-z]")
    found = set(letters.findall(gold)) | set(letters.findall(answer))
    spare = [greek for greek in (r"\xi", r"\eta", r"\zeta", r"\kappa", r"\nu", r"\tau") if greek not in found]
    clashing = sorted(letter for letter in found if letter.isupper() and letter.lower() in found)
    renamed = {letter: spare[i] + " " for i, letter in enumerate(clashing[: len(spare)])}

    def rename(text: str) -> str:
        return letters.sub(lambda match: renamed.get(match.group(), match.group()), text)

    return (rename(gold), rename(answer)) if renamed else (gold, answer)


def _constants_equal(
    gold: sympy.Basic | sympy.MatrixBase, answer: sympy.Basic | sympy.MatrixBase, written: Number | None
) -> bool | None:
    """Compare two numbers by 40 digits, relatively; None when one is not a finite number.

    math-verify's own comparison is absolute (1e-9 = 2e-9). written: the side that is a plain number, if one is.
    """
    if not (isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr)):
        return None
    gold, answer = (
        side.subs({symbol: sympy.I for symbol in side.free_symbols if symbol.name == "i"}) for side in (gold, answer)
    )
    if gold.free_symbols or answer.free_symbols:
        return None
    left, right = gold.evalf(40), answer.evalf(40)
    if not (left.is_number and right.is_number and left.is_finite and right.is_finite):
        return None
    difference = abs(left - right)
    if written is not None and written.decimals >= 6 and abs(right) >= 10**-4:
        return bool(difference < _SIX_PLACES)
    if left == 0 or right == 0:
        return bool((gold - answer).equals(0))
    inexact = gold.has(sympy.Float) or answer.has(sympy.Float)
    return bool(difference <= max(abs(left), abs(right)) * sympy.Float(10) ** (-12 if inexact else -25))
