"""Numbers written in digits: when two of them, or one and a closed form, are the same."""

from fractions import Fraction
from typing import Any

from services.grader.evaluation import MP, is_short_decimal
from services.grader.readings import Number

ROUNDED_DECIMALS = 4  # a gold answer with so many decimals may stand for a closed form that rounds to it
CERTAIN_DECIMALS = 6  # a decimal for a value that has no finite one is right from so many correct places on
_SMALL = Fraction(1, 10_000)  # below it, places after the point say nothing


def numbers_equal(gold: Number, answer: Number) -> bool:
    """Whether two written numbers are the same: exactly, or to six places where no finite decimal exists.

    A percent sign on one side may mean either reading (`50%` is `50` or `0.5`); none on either side never does.
    """
    percents = (Fraction(1), Fraction(1, 100))
    golds = [gold.value * scale for scale in percents] if gold.is_percent > answer.is_percent else [gold.value]
    answers = [answer.value * scale for scale in percents] if answer.is_percent > gold.is_percent else [answer.value]
    return any(_values_equal(gold, left, answer, right) for left in golds for right in answers)


def decimal_equals(written: Number, value: Any, *, is_gold: bool) -> bool | None:
    """Whether a written decimal stands for the real `value` of a closed form, which no short decimal is.

    None where that is no question of rounding: no decimals, too few, or a value that can be written out.
    """
    if not written.decimals or written.is_percent or is_short_decimal(value):
        return None
    difference = abs(value - MP.mpf(written.value.numerator) / written.value.denominator)
    if written.decimals >= CERTAIN_DECIMALS and abs(value) >= float(_SMALL):
        return bool(difference < MP.mpf(10) ** -CERTAIN_DECIMALS)
    if is_gold and written.decimals >= ROUNDED_DECIMALS:
        return bool(difference <= MP.mpf(10) ** -written.decimals / 2)
    return None


def _values_equal(gold: Number, left: Fraction, answer: Number, right: Fraction) -> bool:
    if left == right:
        return True
    for decimal, value, other in ((gold, left, right), (answer, right, left)):
        if decimal.decimals >= CERTAIN_DECIMALS and abs(other) >= _SMALL and not _is_finite_decimal(other):
            return abs(value - other) < Fraction(1, 10**CERTAIN_DECIMALS)
    return gold.decimals >= ROUNDED_DECIMALS and not _is_finite_decimal(right) and _rounds_to(right, gold)


def _rounds_to(value: Any, gold: Number) -> bool:
    return bool(abs(value - gold.value) <= Fraction(1, 2 * 10**gold.decimals))


def _is_finite_decimal(value: Fraction) -> bool:
    denominator = value.denominator
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    return denominator == 1
