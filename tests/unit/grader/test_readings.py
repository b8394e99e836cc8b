"""Numbers, lists and names as they are read from text, against the values they were written from."""

import random
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.contracts.wire import Verdict
from services.grader.equivalence import compare
from services.grader.normalise import collapse, normalise
from services.grader.readings import collection, named_values, number, relation, words


def is_equal(gold: str, answer: str) -> bool:
    return compare(answer, [gold], alarm_s=10).verdict is Verdict.CORRECT


@given(value=st.integers(-(10**15), 10**15))
def test_an_integer_is_read_in_every_spelling(value: int) -> None:
    for text in (
        f"{value}",
        f"{value:,}",
        f"{value:,}".replace(",", "{,}"),
        f"{value:,}".replace(",", r"\,"),
        f"{value}.",
    ):
        read = number(normalise(text))
        assert read is not None and read.value == value, text


@given(value=st.decimals(-(10**6), 10**6, places=4))
def test_a_decimal_is_read_exactly(value: Decimal) -> None:
    read = number(normalise(f"{value:.4f}"))
    assert read is not None and read.value == Fraction(value) and read.decimals == 4


@given(value=st.fractions(min_value=Fraction(1, 99), max_value=999, max_denominator=99))
def test_a_fraction_is_read_in_every_spelling(value: Fraction) -> None:
    top, bottom = value.numerator, value.denominator
    whole, rest = divmod(top, bottom)
    spellings = [rf"\frac{{{top}}}{{{bottom}}}", rf"\dfrac {{{top}}} {{{bottom}}}", f"{top}/{bottom}"]
    if whole and rest:
        spellings += [rf"{whole}\frac{{{rest}}}{{{bottom}}}", rf"{whole} {rest}/{bottom}"]
    for text in spellings:
        read = number(normalise(text))
        assert read is not None and read.value == value, text
    negative = number(normalise(f"-{spellings[0]}"))
    assert negative is not None and negative.value == -value


@given(digits=st.integers(1, 999_999), power=st.integers(-30, 30))
def test_scientific_notation_is_read_exactly(digits: int, power: int) -> None:
    for text in (rf"{digits}\times 10^{{{power}}}", f"{digits}e{power}", rf"{digits} \cdot 10^{{{power}}}"):
        read = number(normalise(text))
        assert read is not None and read.value == digits * Fraction(10) ** power, text


@given(whole=st.integers(0, 99), cycle=st.integers(1, 9_999))
def test_a_repeating_decimal_is_its_fraction(whole: int, cycle: int) -> None:
    digits = str(cycle)
    value = whole + Fraction(cycle, 10 ** len(digits) - 1)
    for text in (rf"{whole}.\overline{{{digits}}}", rf"{whole}.\bar{{{digits}}}", f"{whole}.({digits})"):
        read = number(normalise(text))
        assert read is not None and read.value == value, text


@given(elements=st.lists(st.integers(-99, 99), min_size=2, max_size=6), seed=st.integers(0, 99))
@settings(deadline=None)
def test_order_matters_in_tuples_alone(elements: list[int], seed: int) -> None:
    shuffled = random.Random(seed).sample(elements, len(elements))
    gold, answer = ", ".join(map(str, elements)), ", ".join(map(str, shuffled))
    assert is_equal(gold, answer)
    assert is_equal(rf"\{{{gold}\}}", rf"\{{{answer}\}}")
    assert is_equal(f"({gold})", f"({answer})") == (elements == shuffled)


@given(elements=st.lists(st.integers(-99, 99), min_size=2, max_size=6, unique=True), extra=st.integers(100, 199))
@settings(deadline=None)
def test_a_missing_or_an_extra_element_is_wrong(elements: list[int], extra: int) -> None:
    gold = ", ".join(map(str, elements))
    for others in (elements[:-1], [*elements, extra], [*elements[:-1], extra]):
        answer = ", ".join(map(str, others))
        assert not is_equal(gold, answer)
        assert not is_equal(rf"\{{{gold}\}}", rf"\{{{answer}\}}")
        assert not is_equal(f"({gold})", f"({answer})")


@given(text=st.text(alphabet="{}()ab", max_size=40))
def test_collapsing_brackets_is_idempotent_and_keeps_the_letters(text: str) -> None:
    simpler = collapse(text, "{}")
    assert collapse(simpler, "{}") == simpler
    assert [c for c in simpler if c not in "{}"] == [c for c in text if c not in "{}"]


@given(depth=st.integers(1, 200))
def test_brackets_around_brackets_are_dropped(depth: int) -> None:
    assert collapse("{" * depth + "x" + "}" * depth, "{}") == "{x}"


@given(text=st.text(alphabet=r"0123456789abxyz\{}()[],.^_+-*/=<> $%", max_size=40))
@settings(max_examples=300)
def test_every_reading_takes_any_text(text: str) -> None:
    normal = normalise(text)
    for read in (number, words, collection, relation, named_values):
        read(normal)


@pytest.mark.parametrize(
    "text", ["x=1,y=2", "(x,y)=(1,2)", r"\begin{cases} x=1 \\ y=2 \end{cases}", r"x=1 \text{ and } y=2"]
)
def test_values_are_read_by_name(text: str) -> None:
    assert named_values(normalise(text)) == {"x": "1", "y": "2"}


def test_a_grouped_number_is_one_number_and_a_spaced_comma_makes_a_list() -> None:
    assert collection(normalise("1,234")) is None
    found = collection(normalise("1, 234"))
    assert found is not None and found.elements == ("1", "234")
    inside = collection(normalise("(1,234)"))
    assert inside is not None and inside.elements == ("1", "234")
