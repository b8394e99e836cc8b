"""`multiattempt eval` against replicas over HTTP whose model says what a script has; interrupted, and gone on with."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from live_replica import LiveReplica, live_replica

from services.cli.__main__ import main
from services.evaluation.journal import DIALOGUES, Dialogue, read_dialogues

pytestmark = pytest.mark.integration
NUM_PROBLEMS = 8
WAIT_S = 60.0

Eval = Callable[..., int]


@pytest.fixture(scope="module")
def live(grader_url: str) -> Iterator[LiveReplica]:
    """A wrong answer and a right one in turn; whichever comes first is the sampling seed's to say."""
    with live_replica(["so \\boxed{62}", "\\boxed{72} it is"], grader_url=grader_url) as replica:
        yield replica


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i}+1", "answer": 72}) + "\n" for i in range(NUM_PROBLEMS)))
    return path


@pytest.fixture
def evaluate(live: LiveReplica, problems: Path, tmp_path: Path) -> Eval:
    def run(*words: str, url: str = live.url, output: str = "out") -> int:
        where = ("--rollout", url, "--output", str(tmp_path / output), "--benchmarks", f"mine={problems}")
        return main(["eval", *where, "--attempts", "1-2", "--seeds", "2", "--samples", "3", *words])

    return run


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def kinds(dialogues: list[Dialogue]) -> dict[int, int]:
    return {n: sum(dialogue.max_attempts == n for dialogue in dialogues) for n in (1, 2)}


def test_dialogues_become_figures_a_page_and_pictures(evaluate: Eval, tmp_path: Path, capsys) -> None:
    assert evaluate() == 0
    out = capsys.readouterr().out
    assert "| mine | 8 |" in out and "done: " in out
    dialogues = read_dialogues(tmp_path / "out")
    assert kinds(dialogues) == {1: 3 * NUM_PROBLEMS, 2: 2 * NUM_PROBLEMS}
    one, two = results(tmp_path / "out")["curves"]["mine"]["points"]
    firsts = [dialogue.verdicts[0] == "correct" for dialogue in dialogues if dialogue.max_attempts == 2]
    assert 0 < one["accuracy"]["value"] < 1
    assert (two["accuracy"]["value"], two["accuracy_first"]["value"]) == (1.0, sum(firsts) / len(firsts))
    assert (two["recovered"]["value"], two["repeated"]["value"]) == (1.0, 0.0)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"results.md", "results.json", "dialogues.jsonl", "evaluation.json", "benchmarks.png"} <= written


def test_only_what_is_missing_is_asked_for_again(evaluate: Eval, live: LiveReplica, tmp_path: Path, capsys) -> None:
    assert evaluate() == 0
    before = (tmp_path / "out" / "results.md").read_text()
    path = tmp_path / "out" / DIALOGUES
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-5]) + lines[-5][:40])
    asked = len(live.engine.seeds)
    assert evaluate() == 0
    again = [json.loads(line) for line in lines[-5:]]
    assert len(live.engine.seeds) - asked == sum(len(dialogue["attempts"]) for dialogue in again)
    assert "asking for 40 dialogues, 35 of them from before" in capsys.readouterr().out
    after = (tmp_path / "out" / "results.md").read_text()
    figures = [[line for line in page.splitlines() if line.startswith("|")] for page in (before, after)]
    assert figures[0] == figures[1]
    asked = len(live.engine.seeds)
    assert evaluate() == 0 and len(live.engine.seeds) == asked


def test_another_evaluation_does_not_mix_with_it(evaluate: Eval, tmp_path: Path, capsys) -> None:
    assert evaluate() == 0
    capsys.readouterr()
    assert evaluate("--temperature", "0.5") == 2
    line = capsys.readouterr().err
    assert "holds another evaluation: settings.temperature: 1.0 there, 0.5 here (and 1 more)" in line


def test_without_ground_truth_every_attempt_is_made(evaluate: Eval, tmp_path: Path) -> None:
    assert evaluate("--feedback", "none") == 0
    dialogues = [dialogue for dialogue in read_dialogues(tmp_path / "out") if dialogue.max_attempts == 2]
    assert {dialogue.verdicts for dialogue in dialogues} == {("correct", "incorrect"), ("incorrect", "correct")}
    [_, two] = results(tmp_path / "out")["curves"]["mine"]["points"]
    assert two["accuracy_any"]["value"] == 1.0 and two["accuracy"]["value"] < 1.0


def test_dialogues_are_shown_and_two_evaluations_compared(evaluate: Eval, tmp_path: Path, capsys) -> None:
    assert evaluate("--name", "old") == 0
    assert evaluate("--name", "new", "--seed", "7", output="other") == 0
    capsys.readouterr()
    assert main(["eval", "show", str(tmp_path / "out"), "--wrong", "--allowed", "1", "--limit", "1"]) == 0
    shown = capsys.readouterr().out
    assert "--- attempt 1: - incorrect: 62 (" in shown and "1 of " in shown and "40 in all" in shown
    words = ["eval", "compare", str(tmp_path / "out"), str(tmp_path / "other"), "--output", str(tmp_path / "both")]
    assert main(words) == 0
    page = capsys.readouterr().out
    assert page.startswith("# new against old") and "| mine | 2 | 100.0" in page
    assert {path.name for path in (tmp_path / "both").iterdir()} >= {"comparison.json", "benchmarks.png"}


def test_weights_that_are_others_end_it(evaluate: Eval, grader_url: str, tmp_path: Path, capsys) -> None:
    with live_replica(["\\boxed{72}"], grader_url=grader_url) as other:
        other.engine.version = 3  # its dialogues are still of version 0
        assert evaluate(url=other.url) == 1
    assert "a dialogue is of version 0, not 3; pause training" in capsys.readouterr().out
    assert read_dialogues(tmp_path / "out") == []


@pytest.mark.parametrize("fault", ["nobody", "no replica", "problem"])
def test_what_answers_badly_is_told(fault: str, evaluate: Eval, problems: Path, grader_url: str, capsys) -> None:
    if fault == "nobody":
        assert evaluate(url="http://127.0.0.1:9") == 1
        assert "failed: http://127.0.0.1:9: no answer" in capsys.readouterr().out
    elif fault == "no replica":
        assert evaluate(url=grader_url) == 1
        assert "404" in capsys.readouterr().out
    else:  # too long for the model's context: counted, and the others go on
        problems.write_text(json.dumps({"question": "9+" * 2000, "answer": 72}) + "\n" + problems.read_text())
        assert evaluate("--samples", "0") == 0
        assert (
            "1 allowed attempt: 2 of 18 dialogues could not be run"
            in (problems.parent / "out" / "results.md").read_text()
        )


def test_ctrl_c_keeps_what_is_finished(problems: Path, grader_url: str, tmp_path: Path) -> None:
    """One seed in three makes an attempt that never ends."""
    with live_replica(["\\boxed{62}", "\\boxed{72}", None], grader_url=grader_url) as stuck:
        command = [sys.executable, "-m", "services.cli", "eval", "--rollout", stuck.url, "--output", "out",
                   "--benchmarks", f"mine={problems}", "--attempts", "1", "--samples", "0"]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
        try:
            path, end = tmp_path / "out" / DIALOGUES, time.monotonic() + WAIT_S
            while not path.exists() or not path.read_bytes() or not stuck.engine.num_endless:
                assert time.monotonic() < end, "no dialogue has ended"
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=WAIT_S)
        finally:
            process.kill()
            process.wait(WAIT_S)
    assert process.returncode == 130
    kept = read_dialogues(tmp_path / "out")
    assert f"stopped; the same command goes on ({len(kept)} dialogues are kept)" in out
    assert 0 < len(kept) < 3 * NUM_PROBLEMS
