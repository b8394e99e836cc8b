r"""Finding the final answer in a response."""

import time

import pytest

from services.grader.answer import MAX_TAIL_CHARS, Extraction, extract, unwrap


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{7} and an empty \boxed{} or \boxed{ }", "7"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed {5}", "5"),
        (r"\fbox{5}", "5"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"{ never closed, \boxed{5}", "5"),
        (r"} stray, \boxed{5}", "5"),
        (r"\boxed{\text{first \boxed{2}", "2"),
        (r"\boxed{3} but then \boxed{4", "3"),
        (r"\boxed{1} and \boxed{2}", "1,2"),
        (r"$\boxed{1}$, $\boxed{2}$", "1,2"),
        (r"<think>\boxed{1}</think> \boxed{2}", "2"),
    ],
)
def test_the_last_closed_box_with_something_in_it_is_the_answer(response: str, answer: str) -> None:
    assert extract(response) == answer


@pytest.mark.parametrize(
    "response",
    [
        "",
        "five",
        r"\boxed{}",
        r"\boxed{{}}",
        r"\boxed{ \, }",
        r"\boxed{5",
        r"\boxed{5\}",
        r"\boxedx{5}",
        "the answer is 5",
        r"<think>\boxed{1}</think> so it is one",
        r"\boxed{\boxed{}}",
    ],
)
def test_no_closed_box_means_no_answer(response: str) -> None:
    assert extract(response) is None


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("The answer is 5.", "5"),
        ("Work.\nFinal answer: $\\frac{1}{2}$.", r"\frac{1}{2}"),
        ("2 + 3 = 5\n#### 5", "5"),
        ("**Answer:** 42", "42"),
        ("thinking\n\n1/2", "1/2"),
        ("We conclude that $x = 4$", "x = 4"),
        (r"it is \boxed 7", "7"),
        (r"the answer is 3, no: \boxed{4}", "4"),
        ("I cannot solve this problem", None),
        ("", None),
    ],
)
def test_auto_also_takes_a_stated_answer_and_a_bare_last_line(response: str, answer: str | None) -> None:
    assert extract(response, mode=Extraction.AUTO) == answer


@pytest.mark.parametrize("text", ["3", "$3$", "$$3$$", r"\(3\)", r"\[3\]", r"\boxed{3}", r"$\boxed{3}$", " 3\n"])
def test_what_stands_around_an_answer_comes_off(text: str) -> None:
    assert unwrap(text) == "3"


@pytest.mark.parametrize("text", ["$1$ and $2$", r"\boxed{1} \boxed{2}"])
def test_what_stands_around_parts_of_an_answer_stays(text: str) -> None:
    assert unwrap(text) == text


@pytest.mark.parametrize(
    "unit", ["{", "}", r"\boxed{", r"\boxed{}", "\\", "$", "answer is ", " ", "<think>", r"\boxed{1},"]
)
def test_extraction_of_repeated_fragments_takes_linear_time(unit: str) -> None:
    response = unit * (4 * MAX_TAIL_CHARS // len(unit))
    started = time.perf_counter()
    extract(response, mode=Extraction.AUTO)
    assert time.perf_counter() - started < 1.0


@pytest.mark.parametrize("middle", ["5", ""])
def test_deeply_nested_boxes_take_linear_time(middle: str) -> None:
    started = time.perf_counter()
    extract(r"\boxed{" * 7_000 + middle + "}" * 7_000, mode=Extraction.AUTO)
    unwrap(r"\boxed{" * 7_000 + middle + "}" * 7_000)
    assert time.perf_counter() - started < 1.0


def test_an_overlong_answer_is_none() -> None:
    assert extract(r"\boxed{" + "9" * 20_000 + "}") is None
