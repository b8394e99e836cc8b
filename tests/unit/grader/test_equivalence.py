r"""When an answer equals a gold answer."""

import gc
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.contracts.wire import Verdict
from services.grader.answer import extract
from services.grader.equivalence import Method, compare
from services.grader.normalise import normalise
from services.grader.readings import number

MATH500 = Path(__file__).resolve().parents[4] / "shared" / "data" / "math500.jsonl"

SAME = [
    ("5", "5"),
    (r"\frac{1}{2}", "0.5"),
    (r"\frac{1}{2}", "1/2"),
    (r"\dfrac12", r"\frac{1}{2}"),
    (r"\frac{270}7\text{ degrees}", r"\frac{270}{7}"),
    ("$3$", "3"),
    (r"\boxed{3}", "3"),
    ("1,2", "2,1"),
    ("1,-2", "x=1, x=-2"),
    ("5", r"5\text{ cm}"),
    (r"864 \mbox{ inches}^2", "864"),
    (r"90^\circ", "90"),
    ("51 (trucks)", "51"),
    (r"\sin 30^\circ", r"\frac12"),
    ("1{,}000", "1000"),
    (r"11,\! 111,\! 111,\! 100", "11111111100"),
    (r"\text{even}", "Even"),
    (r"\text{(C)}", "C"),
    ("12.5%", "12.5"),
    ("50%", "0.5"),
    (r"\frac13", "0.333333"),
    (r"0.\overline{3}", r"\frac13"),
    (r"\pi", "3.141593"),
    (r"1\frac{4}{5}", "9/5"),
    ("1e3", "1000"),
    ("½", "0.5"),
    ("x^2", "x²"),
    ("7", "7."),
    (r"1\pm\sqrt{19}", r"1-\sqrt{19}, 1+\sqrt{19}"),
    (r"\{1\pm\sqrt{5},-2\}", r"-2,1+\sqrt5,1-\sqrt5"),
    ("x=5", "5"),
    ("5", "x=5"),
    (r"x \in [-2,7]", "[-2,7]"),
    ("x<3", r"(-\infty,3)"),
    (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty)\cup(-\infty,2)"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)"),
    ("52_8", "52_{8}"),
    ("2:3", "4:6"),
    ("6-5i", "-5i+6"),
    (r"\sqrt{-4}", "2i"),
    ("x^2+2x+1", "(x+1)^2"),
    (r"\frac{\sqrt3}{3}", r"\frac{1}{\sqrt 3}"),
    ("5x - 7y + 11z + 4 = 0", "5x-7y+11z=-4"),
    ("y = 2x + 3", "y=3+2x"),
    ("sqrt(2)", r"\sqrt2"),
    (r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}", r"\begin{pmatrix} -\frac{1}{3} \\ \frac23 \end{pmatrix}"),
]
DIFFERENT = [
    # Accepted by the paper's grader (shared/paper.md section 5).
    ("7", "700"),
    ("0.5", "50"),
    ("56", "5,6"),
    ("5,6", "56"),
    ("10000", "10001"),
    ("3", "3.0001"),
    ("23", "2(3)"),
    (r"\frac{12}{3}", r"\frac{1}{23}"),
    ("(1,2)", "[1,2)"),
    ("[1,2)", "(1,2)"),
    # Accepted by math-verify as it comes (shared/grading.md section 2).
    ("2s", "2t"),
    (r"5\text{ cm}", r"5\text{ m}"),
    (r"\$30", "30 cents"),
    ("3R^2", "3r^2"),
    ("R^2-r^2", "r^2-R^2"),
    ("listen", "silent"),
    ("2024-01-02", "2024-02-01"),
    ("101_2", "101_3"),
    (r"1.2\times10^{-7}", "2.1e-7"),
    (r"\frac{1}{2004!}", r"\frac{1}{2006!}"),
    ("e^{-50}", "e^{-51}"),
    # And the rest of the conventions.
    (r"\frac{1}{2004!}", "0"),
    ("0.5", "50%x"),
    ("1,2", "1"),
    ("1", "1,2"),
    ("5", "5 or 6"),
    ("x=5", "y=5"),
    ("34", "3 4"),
    ("(1,2)", "(2,1)"),
    (r"\pi", "3.1416"),
    (r"\frac13", "0.33"),
    ("1", "0.99999"),
    ("2^{n+1}", "2^n+1"),
    ("x<3", "x>3"),
    ("B", "C"),
    (r"\text{(B)}", "(A) or (B)"),
    ("12", r"\text{(B)}"),
    ("6+9i", "6-9i"),
    ("5", "-5"),
    ("5", "__import__('os').getpid()"),
    ("2", "²"),
]


@pytest.mark.parametrize(("gold", "answer"), SAME)
def test_equal_answers_are_correct(gold: str, answer: str) -> None:
    assert compare(answer, [gold], alarm_s=5).verdict is Verdict.CORRECT


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different_answers_are_incorrect(gold: str, answer: str) -> None:
    assert compare(answer, [gold], alarm_s=5).verdict is Verdict.INCORRECT


@pytest.mark.parametrize(
    ("gold", "answer", "method"),
    [
        ("1/2", "1/2", Method.EXACT),
        ("1/2", "0.5", Method.NUMERIC),
        ("x+y", "y+x", Method.SYMBOLIC),
        ("3", "4", Method.NUMERIC),
        ("(1,2)", "[1,2]", Method.EXACT),
    ],
)
def test_the_deciding_layer_is_reported(gold: str, answer: str, method: Method) -> None:
    assert compare(answer, [gold], alarm_s=5).method is method


def test_any_of_several_golds_will_do() -> None:
    assert compare("0.5", ["3", r"\frac12"], alarm_s=5).verdict is Verdict.CORRECT
    assert compare("0.7", ["3", r"\frac12"], alarm_s=5).verdict is Verdict.INCORRECT
    assert compare("3", ["", "3"], alarm_s=5).verdict is Verdict.CORRECT


@pytest.mark.parametrize("gold", ["", "  ", "$$", r"\boxed{}", r"\frac{1", r"\begin{cases} x"])
def test_a_gold_answer_that_cannot_be_read_is_the_data_sets_fault(gold: str) -> None:
    assert compare("5", [gold], alarm_s=5).verdict is Verdict.UNPARSABLE_GOLD


@pytest.mark.parametrize(
    "answer",
    [
        "9^{9^{9^9}}",
        "9^{9^9}",
        "99999999!",
        "5!!!!",
        r"\binom{99999999}{4}",
        "(a+b+c+d+e+f)^{200}",
        "9" * 5000,
        "(" * 60 + "1" + ")" * 60,
        "10^{99999999}",
        "x" * 1001,
    ],
)
def test_known_bombs_are_told_from_the_gold_answer_before_the_alarm(answer: str) -> None:
    assert compare(answer, ["x+1"], alarm_s=2).verdict is Verdict.INCORRECT
    started = time.perf_counter()
    assert compare(answer, ["5"], alarm_s=5).verdict is Verdict.INCORRECT
    assert compare(answer, [answer], alarm_s=5).verdict is Verdict.CORRECT
    assert time.perf_counter() - started < 0.5


@pytest.mark.parametrize(
    "answer",
    [
        "\ud800",
        "\x00",
        "\u202e6",
        "²",
        "½½½",
        "\\",
        "{",
        "}",
        "{" * 500,
        "\\frac" * 100,
        "_^_^",
        "=" * 300,
        "1,," * 200,
        "\\begin{pmatrix}" * 40,
        "((((",
        "]",
        "\\boxed{",
        "$",
        "%" * 50,
        "1 " * 400,
        "-" * 999,
        "\\sqrt" * 150,
        "!" * 50,
    ],
)
def test_garbage_is_incorrect_and_raises_nothing(answer: str) -> None:
    assert compare(answer, ["5"], alarm_s=2).verdict in (Verdict.INCORRECT, Verdict.TIMEOUT)


@pytest.fixture
def no_gc() -> Iterator[None]:
    """hypothesis hooks the garbage collector; an alarm that rings inside the hook is swallowed. Workers have none."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_gc")
def test_a_comparison_past_the_alarm_is_a_timeout_and_not_incorrect() -> None:
    unfinished = r"\int e^{x^{2}} \sin(x^{3}) \log(x) dx"  # only a gold answer goes as far as sympy's integration
    assert compare("x+1", [unfinished], alarm_s=1).verdict is Verdict.TIMEOUT
    assert compare(unfinished, ["x+1"], alarm_s=1).verdict is Verdict.INCORRECT


@pytest.mark.usefixtures("no_gc")
def test_a_gold_answer_past_the_alarm_costs_the_others_nothing() -> None:
    unfinished = r"\int e^{x^{2}} \sin(x^{3}) \log(x) dx"
    assert compare("x+1", [unfinished, "1+x"], alarm_s=1).verdict is Verdict.CORRECT
    assert compare("x+1", [unfinished, "x+2"], alarm_s=1).verdict is Verdict.TIMEOUT
    assert compare("5", [unfinished, "5"], alarm_s=1).method is Method.EXACT  # at once: spelling is looked at first


def test_numbers_are_read_exactly() -> None:
    read = number(normalise(r"-1\frac{1}{3}"))
    assert read is not None and (read.value.numerator, read.value.denominator) == (-4, 3)
    assert number("5,6") is None
    assert number(normalise("1" * 5000)) is None


@pytest.mark.skipif(not MATH500.exists(), reason=f"{MATH500} is not here")
def test_every_math500_answer_equals_itself_by_spelling() -> None:
    rows = [json.loads(line) for line in MATH500.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 500
    for row in rows:
        answer = extract(rf"So it is $\boxed{{{row['answer']}}}$.")
        assert answer is not None
        found = compare(answer, [row["answer"]], alarm_s=5)
        assert (found.verdict, found.method) == (Verdict.CORRECT, Method.EXACT), row["answer"]
