"""Dates, times, bases and residues."""

import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.contracts.wire import Verdict
from services.grader.equivalence import compare

DIGITS = "0123456789ABCDEF"


def is_equal(gold: str, answer: str) -> bool:
    return compare(answer, [gold], alarm_s=10).verdict is Verdict.CORRECT


def in_base(value: int, base: int) -> str:
    digits = ""
    while value:
        value, digit = divmod(value, base)
        digits = DIGITS[digit] + digits
    return digits or "0"


@given(first=st.dates(), second=st.dates(datetime.date(2000, 1, 1), datetime.date(2000, 3, 1)))
@settings(deadline=None)
def test_a_date_is_the_same_day_in_every_spelling(first: datetime.date, second: datetime.date) -> None:
    for day in (first.replace(year=max(first.year, 1000)), second):
        gold = day.isoformat()
        assert is_equal(gold, rf"\text{{{day:%B} {day.day}, {day.year}}}")
        assert is_equal(gold, f"{day.day} {day:%b} {day.year}")
        assert not is_equal(gold, (day.replace(day=1) if day.day > 1 else day.replace(day=2)).isoformat())


@given(minute=st.integers(0, 24 * 60 - 1), other=st.integers(0, 24 * 60 - 1))
@settings(deadline=None)
def test_a_time_of_day_is_the_same_on_both_clocks(minute: int, other: int) -> None:
    def twelve(minutes: int) -> str:
        hour, rest = divmod(minutes, 60)
        return rf"{hour % 12 or 12}:{rest:02d}\text{{ {'PM' if hour >= 12 else 'AM'}}}"

    assert is_equal(twelve(minute), twelve(minute).replace(r"\text{ ", " ").replace("}", ""))
    assert is_equal(twelve(minute), twelve(other)) == (minute == other)
    if minute >= 13 * 60:
        assert is_equal(twelve(minute), f"{minute // 60}:{minute % 60:02d}")


@given(value=st.integers(0, 10**6), base=st.integers(2, 16), other=st.integers(2, 16))
@settings(deadline=None)
def test_numbers_in_bases_are_equal_when_their_values_are(value: int, base: int, other: int) -> None:
    gold = f"{in_base(value, base)}_{{{base}}}"
    assert is_equal(gold, f"{in_base(value, other)}_{{{other}}}")
    assert not is_equal(gold, f"{in_base(value + 1, other)}_{{{other}}}")
    assert is_equal(gold, in_base(value, base))


@given(residue=st.integers(-50, 50), modulus=st.integers(2, 30), turns=st.integers(-3, 3))
@settings(deadline=None)
def test_residues_are_equal_modulo_their_modulus(residue: int, modulus: int, turns: int) -> None:
    gold = rf"x \equiv {residue} \pmod{{{modulus}}}"
    assert is_equal(gold, rf"{residue + turns * modulus} \pmod{{{modulus}}}")
    assert not is_equal(gold, rf"{residue + 1} \pmod{{{modulus}}}")
    assert not is_equal(gold, rf"{residue} \pmod{{{modulus + 1}}}")


@pytest.mark.parametrize(
    ("gold", "answer"), [("1:2", "2:4"), ("2:3:4", "4:6:8"), (r"1:\sqrt{3}", r"\sqrt3:3"), ("3:4", r"\frac34")]
)
def test_ratios_are_proportions(gold: str, answer: str) -> None:
    assert is_equal(gold, answer)


@pytest.mark.parametrize(
    ("gold", "answer"), [("1:2", "2:1"), ("1:2:3", "1:3:2"), (r"1:\sqrt{3}:2", r"1:2:\sqrt3"), ("1:2", "1:2:3")]
)
def test_other_ratios_are_told_apart(gold: str, answer: str) -> None:
    assert not is_equal(gold, answer)
