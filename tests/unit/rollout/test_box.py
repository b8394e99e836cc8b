"""The scanner fires on the token that closes a non-empty box, however the text is cut, just where the grader agrees."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.grader.answer import extract
from services.rollout.box import BoxScanner

PIECES = ["\\boxed{", "\\boxed", "\\fbox{", "\\box", "boxed{", "\\", "{", "}", "\\{", "\\}", "\\frac", "\\,", "x", "7",
          " ", "\n", "$", "~", "é", "的", "\\boxedx{", "         "]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)


def closes_at(text: str, cuts: frozenset[int] = frozenset()) -> int | None:
    """How many characters the scanner takes until it fires, if the text arrives cut at `cuts`."""
    scanner, bounds = BoxScanner(), sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    for start, end in itertools.pairwise(bounds):
        if scanner.feed(text[start:end]):
            return end
    return None


def closes_at_character(text: str) -> int | None:
    return closes_at(text, frozenset(range(len(text))))


@pytest.mark.parametrize(
    ("text", "end"),
    [
        (r"so \boxed{3} and", len(r"so \boxed{3}")),
        (r"\boxed{\frac{1}{2}}.", len(r"\boxed{\frac{1}{2}}")),
        (r"\boxed{\{1,2\}}", len(r"\boxed{\{1,2\}}")),
        (r"\boxed {4}", len(r"\boxed {4}")),
        (r"\boxed{} \boxed{ } \boxed{2}", len(r"\boxed{} \boxed{ } \boxed{2}")),
        (r"\boxed{left open, then \boxed{2} more", len(r"\boxed{left open, then \boxed{2}")),
        (r"\boxed{\boxed{5}}", len(r"\boxed{\boxed{5}")),
        (r"\boxed{3\}", None),
        (r"boxed{3} \box{3} \boxedx{3}", None),
        (r"}}}\boxed{3}", len(r"}}}\boxed{3}")),
        ("", None),
    ],
)
def test_it_fires_where_the_first_filled_box_closes(text, end):
    assert closes_at_character(text) == end


@given(TEXTS)
@settings(max_examples=600, deadline=None)
def test_it_fires_exactly_where_the_grader_first_finds_an_answer(text):
    first = next((end for end in range(len(text) + 1) if extract(text[:end]) is not None), None)
    assert closes_at_character(text) == first


@given(TEXTS, st.frozensets(st.integers(1, 60)))
@settings(max_examples=300, deadline=None)
def test_how_the_text_is_cut_does_not_matter(text, cuts):
    exact = closes_at_character(text)
    found = closes_at(text, cuts)
    if exact is None:
        assert found is None
    else:
        assert found == min(cut for cut in {*cuts, len(text)} if cut >= exact)


def test_a_hostile_text_takes_linear_work():
    scanner = BoxScanner()
    assert not scanner.feed("\\boxed{" * 20_000 + "{" * 100_000)
    assert scanner.feed("x" + "}" * 120_000)
