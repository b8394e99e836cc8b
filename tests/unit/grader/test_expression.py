r"""Equality of expressions, against exact arithmetic that knows nothing of LaTeX, sympy or mpmath."""

from fractions import Fraction
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.contracts.wire import Verdict
from services.grader.equivalence import compare
from services.grader.expression import UnreadableError, is_bounded, parse, real_constant

Polynomial = dict[tuple[int, int], int]  # (power of x, power of y) -> coefficient

coefficients = st.integers(-9, 9)
polynomials = st.dictionaries(
    st.tuples(st.integers(0, 2), st.integers(0, 2)), coefficients.filter(bool), min_size=1, max_size=4
)


def multiplied(left: Polynomial, right: Polynomial) -> Polynomial:
    total: Polynomial = {}
    for ((a, b), c), ((d, e), f) in product(left.items(), right.items()):
        total[a + d, b + e] = total.get((a + d, b + e), 0) + c * f
    return {power: coefficient for power, coefficient in total.items() if coefficient}


def latex(polynomial: Polynomial) -> str:
    terms = [f"{c}x^{{{a}}}y^{{{b}}}" for (a, b), c in polynomial.items()]
    return "+".join(terms).replace("+-", "-") or "0"


def is_equal(gold: str, answer: str) -> bool:
    found = compare(answer, [gold], alarm_s=10)
    assert found.verdict in (Verdict.CORRECT, Verdict.INCORRECT), found
    return found.verdict is Verdict.CORRECT


@given(left=polynomials, right=polynomials)
@settings(max_examples=60, deadline=None)
def test_a_product_equals_what_it_expands_to(left: Polynomial, right: Polynomial) -> None:
    assert is_equal(latex(multiplied(left, right)), f"({latex(left)})({latex(right)})")


@given(left=polynomials, right=polynomials)
@settings(max_examples=60, deadline=None)
def test_polynomials_are_equal_when_their_coefficients_are(left: Polynomial, right: Polynomial) -> None:
    assert is_equal(latex(left), latex(dict(reversed(right.items())))) == (left == right)


@given(polynomial=polynomials, power=st.tuples(st.integers(0, 2), st.integers(0, 2)), change=coefficients.filter(bool))
@settings(max_examples=60, deadline=None)
def test_one_other_coefficient_makes_another_polynomial(
    polynomial: Polynomial, power: tuple[int, int], change: int
) -> None:
    other = {**polynomial, power: polynomial.get(power, 0) + change}
    assert not is_equal(latex(polynomial), latex({key: value for key, value in other.items() if value}))


@given(
    top=st.integers(-99, 99), bottom=st.integers(1, 99), whole=st.integers(-50, 50), root=st.integers(2, 40),
    scale=st.integers(2, 9),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_surds_are_equal_exactly_when_their_parts_are(top: int, bottom: int, whole: int, root: int, scale: int) -> None:
    gold = rf"{whole}+\frac{{{top}}}{{{bottom}}}\sqrt{{{root * scale**2}}}"
    assert is_equal(gold, rf"\frac{{{top * scale}\sqrt{{{root}}}}}{{{bottom}}}+{whole}")
    if not (top == 0 and root):
        assert not is_equal(gold, rf"{whole}+\frac{{{top + 1}}}{{{bottom}}}\sqrt{{{root * scale**2}}}")


@given(value=st.fractions(min_value=-999, max_value=999, max_denominator=999))
@settings(max_examples=80, deadline=None)
def test_the_value_of_a_fraction_is_its_value(value: Fraction) -> None:
    tree = parse(rf"\frac{{{value.numerator}}}{{{value.denominator}}}", alarm_s=5)
    found = real_constant(tree)
    assert found is not None and abs(found - float(value)) < 1e-9 * max(1, abs(value))


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        (r"\frac{1}{2004!}", r"\frac{1}{2006!}"),
        ("2^{-99}", "2^{-98}"),
        ("e^{-50}", "e^{-51}"),
        (r"\frac{\pi}{10^{20}}", r"\frac{2\pi}{10^{20}}"),
        ("2^{100}", "1267650600228229401496703205377"),
        ("100!", "100!+1"),
        ("0", "10^{-30}"),
        ("10^{-30}", "0"),
    ],
)
def test_size_does_not_blur_a_difference(gold: str, answer: str) -> None:
    assert not is_equal(gold, answer)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("2^{100}", "1267650600228229401496703205376"),
        ("0", r"\sqrt{2}+\sqrt{3}-\sqrt{5+2\sqrt{6}}"),
        (r"\sqrt[3]{-8}", "-2"),
        ("(-1)^n", r"\cos(n\pi)"),
        (r"\sum_{k=1}^{n} k^2", r"\frac{n(n+1)(2n+1)}{6}"),
        ("f(x)+f(y)", "f(y)+f(x)"),
    ],
)
def test_equal_values_are_found_equal(gold: str, answer: str) -> None:
    assert is_equal(gold, answer)


@pytest.mark.parametrize(
    "text", ["1" * 1_000, "(" * 30 + "x" + "(+1)" * 30, "99999999!", r"\binom{99999999}{4}", "5!!", "^" * 100]
)
def test_texts_that_would_cost_the_parser_too_much_are_not_read(text: str) -> None:
    assert not is_bounded(text)
    with pytest.raises(UnreadableError, match="too large"):
        parse(text, alarm_s=1)
