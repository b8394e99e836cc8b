"""Answers as mathematics for the page: what is drawn, what is not, and that nothing in it acts."""

from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.grader.explain import MATHML, MAX_CHARS, explain, to_mathml


def drawn(text: str) -> str:
    mathml = to_mathml(text)
    assert mathml is not None
    assert mathml.startswith(f'<math display="inline" xmlns="{MATHML}">')
    return mathml.removesuffix("</math>").partition(">")[2]


@pytest.mark.parametrize("text", [r"\frac{1}{2}", r"$\frac{1}{2}$", r"\boxed{\frac12}", r"\(\dfrac12\)"])
def test_both_sides_are_drawn_without_what_stands_around_them(text: str) -> None:
    assert "<mfrac>" in drawn(text)


def test_the_spelling_that_is_compared_is_told() -> None:
    explanation = explain("½", [r"$\dfrac12$", "0.5"])
    assert explanation.normalised_answer == explanation.normalised_golds[0] == r"\frac{1}{2}"
    assert len(explanation.gold_mathml) == 2


@pytest.mark.parametrize("text", ["", "$$", "{", r"\frac", "x^", "1" * (MAX_CHARS + 1), "{" * 45 + "x" + "}" * 45])
def test_what_cannot_be_drawn_is_none(text: str) -> None:
    assert to_mathml(text) is None


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\text{<script>alert(1)</script>}", "<mrow><mtext>&lt;script&gt;alert(1)&lt;/script&gt;</mtext></mrow>"),
        (
            r"\text{&lt;img/src=x&gt;}",
            "<mrow><mtext>&lt;img/src=x&gt;</mtext></mrow>",
        ),
        (r"\href{javascript:alert(1)}{x}", "<mrow><mrow><mrow><mi>x</mi></mrow></mrow></mrow>"),
        (r"\style{background:url(//evil)}{x}", "<mrow><mrow><mi>x</mi></mrow></mrow>"),
        (r"\class{evil}{x}", "<mrow><mrow><mi>x</mi></mrow></mrow>"),
        (r"\color{red\" onload=\"alert(1)}{x}", "<mrow><mstyle><mrow><mi>x</mi></mrow></mstyle></mrow>"),
    ],
)
def test_nothing_that_acts_is_drawn(text: str, content: str) -> None:
    assert drawn(text) == content


_PIECES = st.sampled_from([
    r"\frac", r"\sqrt", r"\text{", r"\href{", r"\left(", r"\right)", r"\begin{matrix}", r"\end{matrix}", r"\over", "&",
    "{", "}", "^", "_", "'", "x", "12", "<script>", '"', "\x00", "\ud800", "\u202e", "]]>", "&#x3C;", r"\\", "$", "%",
])  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(_PIECES, max_size=40).map("".join))
def test_any_text_gives_well_formed_mathematics_or_none(text: str) -> None:
    mathml = to_mathml(text)
    if mathml is not None:
        for element in ElementTree.fromstring(mathml.encode()).iter():
            assert element.tag.startswith(f"{{{MATHML}}}m")
            assert not {"href", "style", "class", "id"} & set(element.attrib)
