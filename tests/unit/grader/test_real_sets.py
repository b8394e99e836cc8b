"""Sets of reals in every spelling, against membership of each point of a grid."""

from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.contracts.wire import Verdict
from services.grader.equivalence import compare

GRID = [Fraction(n, 2) for n in range(-25, 26)]  # every integer end and a point between each two

Interval = tuple[int, int, bool, bool]  # low, high, low closed, high closed

intervals = st.lists(st.integers(-10, 10), min_size=2, max_size=6, unique=True).map(sorted)


def is_equal(gold: str, answer: str) -> bool:
    return compare(answer, [gold], alarm_s=10).verdict is Verdict.CORRECT


@st.composite
def unions(draw: st.DrawFn) -> list[Interval]:
    ends = draw(intervals)
    pairs = list(pairwise(ends))[::2]
    return [(low, high, draw(st.booleans()), draw(st.booleans())) for low, high in pairs]


def holds(union: list[Interval], point: Fraction) -> bool:
    return any(
        low < point < high or (point == low and low_closed) or (point == high and high_closed)
        for low, high, low_closed, high_closed in union
    )


def as_intervals(union: list[Interval]) -> str:
    return r"\cup".join(f"{'[' if c else '('}{low},{high}{']' if d else ')'}" for low, high, c, d in union)


def as_inequalities(union: list[Interval]) -> str:
    sign = {True: r"\le ", False: "<"}
    return r"\text{ or }".join(f"{low}{sign[c]}x{sign[d]}{high}" for low, high, c, d in union)


@given(union=unions())
@settings(max_examples=60, deadline=None)
def test_a_union_is_the_same_as_intervals_and_as_inequalities_in_any_order(union: list[Interval]) -> None:
    assert is_equal(as_intervals(union), as_inequalities(union))
    assert is_equal(as_inequalities(union), as_intervals(union[::-1]))


@given(left=unions(), right=unions())
@settings(max_examples=80, deadline=None)
def test_two_sets_are_equal_when_they_hold_the_same_points(left: list[Interval], right: list[Interval]) -> None:
    expected = all(holds(left, point) == holds(right, point) for point in GRID)
    if len(left) > 1 or len(right) > 1:  # one pair of brackets alone may be a tuple
        assert is_equal(as_intervals(left), as_intervals(right)) is expected
    assert is_equal(as_inequalities(left), as_inequalities(right)) is expected


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        (r"\mathbb{R}\setminus\{0\}", r"x\neq 0"),
        (r"\{x\mid x\geq 2\}", r"[2,\infty)"),
        (r"x\in(-\infty,1]\cup(1,3)", "x<3"),
        (r"7\ge x\ge -2", "[-2,7]"),
        (r"x>1, x<3", "(1,3)"),
        (r"x<\sqrt{2}", r"(-\infty,2^{1/2})"),
        (r"\text{all real numbers}", r"(-\infty,\infty)"),
    ],
)
def test_every_notation_of_a_set_is_understood(gold: str, answer: str) -> None:
    assert is_equal(gold, answer)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("x>3", r"x\ge 3"),
        ("x>3", "y>3"),
        ("[1,2)", "(1,2)"),
        (r"(0,1)\cup(2,3)", "(0,3)"),
        (r"x\neq 0", r"x>0"),
        ("x>3", "3"),
    ],
)
def test_other_sets_are_told_apart(gold: str, answer: str) -> None:
    assert not is_equal(gold, answer)
