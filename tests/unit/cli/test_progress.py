"""Lines for people, out of metrics.jsonl."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from services.cli.progress import Progress, Tail, _Terminal, format_step

ROW = {
    "step": 3,
    "version": 3,
    "reward": -0.25,
    "accuracy_first": 0.4,
    "accuracy_last": 0.625,
    "dialogues_per_s": 51.26,
    "queue_waiting": 17.0,
    "staleness_mean": 0.5,
    "step_s": 30.0,
}


def plain() -> tuple[Progress, io.StringIO]:
    text = io.StringIO()
    return Progress(Console(file=text, highlight=False)), text


def write(path: Path, *steps: int) -> None:
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in steps))


def test_a_step_shows_every_figure() -> None:
    cells = format_step(ROW, steps=10, left_s=210).split()
    assert cells == ["3/10", "-0.250", "40.0%", "62.5%", "51.3", "17", "0.50", "3", "3:30"]


def test_a_missing_or_null_figure_is_a_dash() -> None:
    assert format_step({"step": 1, "reward": None}, steps=2, left_s=None).split() == ["1/2", *["-"] * 8]


def test_the_time_left_is_reckoned_from_the_last_steps() -> None:
    progress, text = plain()
    progress.step({**ROW, "step": 1, "step_s": 10.0}, steps=4)
    progress.step({**ROW, "step": 2, "step_s": 30.0}, steps=4)
    assert text.getvalue().splitlines()[-1].endswith("0:40")


def test_without_a_terminal_there_are_only_plain_lines() -> None:
    progress, text = plain()
    with progress:
        progress.doing("starting [grader]")
        progress.doing("starting [grader]")
    assert text.getvalue() == "[  0:00] starting [grader]\n"


@pytest.mark.parametrize("trouble", [BrokenPipeError(), OSError(5, "no terminal")])
def test_a_reader_that_went_away_does_not_end_the_run(trouble: OSError) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise trouble

    progress = Progress(_Terminal(file=Gone()))
    progress.say("anybody there?")
    progress.say("nobody")


def test_only_complete_new_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 1)
    tail = Tail(path)
    assert tail.new_rows() == []
    with path.open("a") as file:
        file.write('{"step": 2}\n{"st')
    assert tail.new_rows() == [{"step": 2}]
    with path.open("a") as file:
        file.write('ep": 3}\n')
    assert tail.new_rows() == [{"step": 3}]


def test_a_file_cut_by_a_resumed_learner_is_followed_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    write(path, 1, 2, 3)
    assert len(tail.new_rows()) == 3
    write(path, 1)
    assert tail.new_rows() == []
    write(path, 1, 2)
    assert tail.new_rows() == [{"step": 2}]


def test_a_file_cut_and_regrown_between_two_looks_never_yields_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    write(path, 1, 2)
    tail.new_rows()
    path.write_text(json.dumps({"step": 1, "reward": "long enough to reach beyond"}) + '\n{"step": 2}\n')
    assert tail.new_rows() == [{"step": 2}]
