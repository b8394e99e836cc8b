"""Units: conversion against factors written down here once more, and what may not be the same."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.contracts.wire import Verdict
from services.grader.equivalence import compare
from services.grader.normalise import normalise
from services.grader.units import factor, hedges, split, total

METRES = {"mm": Fraction(1, 1000), "cm": Fraction(1, 100), "m": Fraction(1), "km": Fraction(1000)}
SECONDS = {"seconds": Fraction(1), "minutes": Fraction(60), "hours": Fraction(3600), "days": Fraction(86_400)}
SAME_KIND = [METRES, SECONDS]


def is_equal(gold: str, answer: str) -> bool:
    return compare(answer, [gold], alarm_s=10).verdict is Verdict.CORRECT


def decimal(value: Fraction) -> str:
    return f"{value.numerator}" if value.denominator == 1 else rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


@given(
    value=st.fractions(min_value=1, max_value=999, max_denominator=50), kind=st.sampled_from(SAME_KIND), data=st.data()
)
@settings(deadline=None)
def test_a_quantity_equals_itself_in_another_unit(
    value: Fraction, kind: dict[str, Fraction], data: st.DataObject
) -> None:
    first, second = data.draw(st.sampled_from(list(kind))), data.draw(st.sampled_from(list(kind)))
    gold = rf"{decimal(value)}\text{{ {first}}}"
    assert is_equal(gold, rf"{decimal(value * kind[first] / kind[second])}\text{{ {second}}}")
    assert is_equal(gold, rf"{decimal(value)}\text{{ {second}}}") == (first == second)


@given(value=st.integers(1, 999), first=st.sampled_from(list(METRES)), second=st.sampled_from(list(SECONDS)))
@settings(deadline=None)
def test_quantities_of_different_kinds_are_never_equal(value: int, first: str, second: str) -> None:
    assert not is_equal(rf"{value}\text{{ {first}}}", rf"{value}\text{{ {second}}}")


@given(value=st.integers(1, 999), unit=st.sampled_from([*METRES, *SECONDS, "apples", r"square units"]))
@settings(deadline=None)
def test_a_missing_unit_is_forgiven(value: int, unit: str) -> None:
    assert is_equal(rf"{value}\text{{ {unit}}}", str(value))
    assert is_equal(str(value), rf"{value}\text{{ {unit}}}")


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        (r"5\text{ m}^2", r"5\text{ cm}^2", Fraction(1, 10_000)),
        (r"36\text{ km/h}", r"10\text{ m/s}", Fraction(18, 5)),
        (r"5\text{ J}", r"5\text{ N m}", Fraction(1)),
        (r"\$5", "5 cents", Fraction(1, 100)),
        ("7 apples", "7 red apples", Fraction(1)),
        ("7 red apples", "7 green apples", None),
        (r"5\text{ kg}", r"5\text{ m}", None),
        (r"5\%\text{ increase}", r"5\%\text{ decrease}", None),
        (r"72^\circ F", r"72^\circ C", None),
    ],
)
def test_units_convert_or_contradict(gold: str, answer: str, expected: Fraction | None) -> None:
    assert factor(split(normalise(gold), expected=True)[1], split(normalise(answer), expected=True)[1]) == expected


@pytest.mark.parametrize("text", ["2x", "3ab", r"5\sqrt{2}", "2t", r"x\in A", "mgh", r"\sin x"])
def test_algebra_has_no_unit(text: str) -> None:
    assert split(normalise(text)) == (normalise(text), None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2 hours 30 minutes", "150 minute"), (r"5\text{ ft }6\text{ in}", "66 in"), ("12 apples", "12 apples")],
)
def test_mixed_quantities_are_added_up(text: str, expected: str) -> None:
    assert total(normalise(text)) == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("5 or possibly 7", True), (r"\text{not }7", True), (r"\frac{1}{2}", False)]
)
def test_words_that_take_an_answer_back_are_noticed(text: str, expected: bool) -> None:
    assert hedges(text) is expected
