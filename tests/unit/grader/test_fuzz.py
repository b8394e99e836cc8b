"""LaTeX-like noise through every layer: whatever comes, there is a verdict of the documented kind and no exception."""
# ruff: noqa: RUF001 - odd characters are part of it

import logging
import warnings
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from math_verify.errors import TimeoutException

from services.contracts.settings import GraderSection
from services.contracts.wire import Verdict
from services.grader.answer import Extraction, extract, is_blank, unwrap
from services.grader.app import create_app
from services.grader.equivalence import compare
from services.grader.normalise import normalise
from tests.grader_process import until

PIECES = (
    r"\frac", r"\sqrt", r"\left", r"\right", r"\text", r"\boxed", r"\fbox", r"\cdot", r"\pm", r"\pi", r"\infty", r"\%",
    r"\circ", r"\in", r"\cup", r"\{", r"\}", r"\\", r"\begin{pmatrix}", r"\end{pmatrix}", r"\sum_{n=1}^{3}", r"\int",
    r"\lim_{x\to0}", r"\log_", r"\sin", r"\overline", r"\binom", r"\le", r"\ge", r"\neq", r"\mathbb{R}", r"\,", r"\$",
    "{", "}", "(", ")", "[", "]", "|", "^", "_", "+", "-", "*", "/", "=", "<", ">", ",", ";", ":", ".", "!", "%", "&",
    "~", "$", " ", "\n", "0", "1", "2", "9", "12", "0.5", "1,000", "x", "y", "i", "e", "A", "cm", "and", "or", "not",
    "even", "the answer is", "####", "**", "</think>", "½", "²", "√", "−", "π", "°", "\u202e", "\u200b", "\0", "\ud800",
    "７", "👍",
)  # fmt: skip
NOISE = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), max_size=25).map("".join)
MATHS = st.recursive(
    st.sampled_from(["0", "1", "2", "-3", "0.25", "x", "y", "n", r"\pi", "e", "i", r"\infty", "50\\%", "5\\text{ cm}"]),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "=", ",", "<", r"\cdot ", "/", r"\cup "]), inner).map("".join),
        st.builds(lambda a, b: rf"\frac{{{a}}}{{{b}}}", inner, inner),
        st.builds(lambda a, b: rf"{{{a}}}^{{{b}}}", inner, inner),
        st.builds(lambda a: rf"\sqrt{{{a}}}", inner),
        st.builds(lambda a: rf"\left({a}\right)", inner),
        st.builds(lambda a: rf"\{{{a}\}}", inner),
        st.builds(lambda a: rf"\sin({a})", inner),
        st.builds(lambda a, b: rf"\begin{{pmatrix}}{a}&{b}\end{{pmatrix}}", inner, inner),
    ),
    max_leaves=6,
)
TEXT = st.one_of(NOISE, MATHS)
FUZZ = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """As in a worker: the libraries' warnings and logs are not ours."""
    logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@FUZZ
@given(NOISE, st.sampled_from(Extraction))
def test_extraction_gives_a_part_of_the_response_or_nothing(response: str, mode: Extraction) -> None:
    answer = extract(response, mode=mode)
    assert answer is None or (answer == answer.strip() and not is_blank(answer))
    assert isinstance(unwrap(response), str)


@FUZZ
@given(TEXT)
def test_normalising_ends_and_gives_text(text: str) -> None:
    assert isinstance(normalise(text), str)


@FUZZ
@given(TEXT, TEXT)
def test_comparing_gives_a_documented_verdict(answer: str, gold: str) -> None:
    try:
        found = compare(answer, [gold], alarm_s=1)
    except TimeoutException:  # the alarm struck between two stages; in a worker the pool's deadline is behind it
        return
    assert isinstance(found.verdict, Verdict)
    assert found.verdict is not Verdict.NO_ANSWER


@FUZZ
@given(MATHS.filter(lambda text: "," not in text))
def test_a_readable_answer_equals_itself(text: str) -> None:
    assert compare(text, [text], alarm_s=1).verdict in (Verdict.CORRECT, Verdict.UNPARSABLE_GOLD)


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(create_app(GraderSection(workers=2))) as client:
        until(lambda: client.get("/readyz").status_code == 200)
        yield client


@settings(FUZZ, max_examples=60)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=8))
def test_the_service_answers_every_item_with_a_documented_verdict(
    client: TestClient, pairs: list[tuple[str, str]]
) -> None:
    clean = [(a.encode("utf-8", "replace").decode(), b.encode("utf-8", "replace").decode()) for a, b in pairs]
    items = [{"response": rf"\boxed{{{a}}}", "gold": b, "extraction": "auto"} for a, b in clean]
    reply = client.post("/v1/grade/batch", json={"items": items})
    assert reply.status_code == 200, reply.text
    results = reply.json()["results"]
    assert len(results) == len(items)
    assert all(result["correct"] == (result["verdict"] == "correct") for result in results)
    assert {result["verdict"] for result in results} <= {verdict.value for verdict in Verdict}
