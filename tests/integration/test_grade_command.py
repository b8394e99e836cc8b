"""`multiattempt grade` with real worker processes, in its own process and by a running grader."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from live_grader import live_grader

pytestmark = pytest.mark.integration

LINES = [
    {"response": r"so \boxed{0.5}", "gold": r"\frac{1}{2}", "id": "half"},
    {"response": "The answer is 4.", "gold": ["5", "4"]},
    {"response": "The answer is 4.", "gold": 4, "extraction": "boxed"},
    {"response": "7", "gold": "8"},
    {"response": "7"},
]


def grade(*words: str, text: str = "") -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "services.cli", "grade", *words], input=text, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def test_one_response_is_graded_in_this_process() -> None:
    code, out, err = grade(r"I think \boxed{0.5}", "--gold", "7", "--gold", "1/2")
    assert (code, err) == (0, "")
    fields = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert (fields["verdict"], fields["extracted"], fields["method"]) == ("correct", "0.5", "numeric")
    assert fields["time"].endswith(" ms")


def test_check_turns_a_wrong_answer_into_exit_code_3_and_json_is_the_interfaces() -> None:
    code, out, _ = grade("it is 7", "--gold", "8", "--json", "--check", "--extraction", "boxed")
    assert code == 3
    assert json.loads(out) | {"elapsed_ms": 0} == {
        "id": None, "correct": False, "verdict": "no_answer", "extracted": None, "method": None, "elapsed_ms": 0,
        "cached": False,
    }  # fmt: skip


def test_a_bad_line_is_named_and_the_good_ones_are_graded(file: Path, tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    code, out, err = grade("--file", str(file), "--output", str(output))
    assert code == 1
    assert err == f"{file}:5: `gold` is missing; the right answer is wanted, a string or a list of strings\n"
    results = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(r["line"], r["id"], r["verdict"]) for r in results] == [
        (1, "half", "correct"), (2, None, "correct"), (3, None, "no_answer"), (4, None, "incorrect"),
    ]  # fmt: skip
    assert "2 of 4 correct (50.0%), 1 bad line" in out and "\x1b" not in out + err


def test_a_running_grader_is_used_and_standard_input_read(file: Path) -> None:
    lines = file.read_text().splitlines(keepends=True)[:2]
    with live_grader() as url:
        code, out, err = grade("--file", "-", "--url", url, "--json", "--check", text="".join(lines))
    summary = json.loads(out)
    assert (code, err) == (0, "")
    assert (summary["num_graded"], summary["num_correct"], summary["num_bad_lines"]) == (2, 2, 0)
    assert {part["verdict"] for part in summary["parts"]} == {"correct"}


def test_thousands_of_lines_keep_their_order(tmp_path: Path) -> None:
    lines = [{"response": str(n), "gold": str(n % 50), "id": n} for n in range(5_000)]
    output = tmp_path / "results.jsonl"
    code, out, _ = grade(
        "--file", "-", "--output", str(output), text="".join(json.dumps(line) + "\n" for line in lines)
    )
    results = [json.loads(line) for line in output.read_text().splitlines()]
    assert code == 0 and [result["id"] for result in results] == [str(n) for n in range(5_000)]
    assert [result["correct"] for result in results] == [n < 50 for n in range(5_000)] and "50 of 5,000" in out


def test_a_grader_that_is_away_is_one_line_and_exit_code_1() -> None:
    code, _, err = grade("7", "--gold", "7", "--url", "http://127.0.0.1:9")
    assert code == 1 and err.startswith("multiattempt: error: no verdict") and err.count("\n") == 1
