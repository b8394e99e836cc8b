"""Counts, intervals and the table that the user sees."""

import pytest

from services.evaluation.plot import plot_run, read_metrics
from services.evaluation.results import Evaluation, Point, load, save, table, wilson_interval


def evaluation(label, solved, version):
    points = tuple(Point(max_attempts=n, num_problems=200, num_solved=s, num_solved_first=s) for n, s in solved.items())
    return Evaluation(label, version, 1.0, points, seconds=2.0, dialogues_per_s=100.0)


def test_wilson_interval_matches_published_values():
    low, high = wilson_interval(8, 10)  # Wilson (1927), as tabulated by Newcombe 1998: 0.4902 to 0.9433
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_a_saved_evaluation_is_read_back(tmp_path):
    before = evaluation("before", {1: 50, 2: 80}, version=0)
    save(before, tmp_path)
    assert load(tmp_path, "before") == before
    assert load(tmp_path, "after") is None


def test_table_has_a_row_for_each_number_of_attempts():
    lines = table([evaluation("before", {1: 50, 2: 80}, 0), evaluation("after", {1: 150}, 9)]).splitlines()
    assert lines[0] == "| allowed attempts | before (version 0) | after (version 9) |"
    assert lines[2].startswith("| 1 | 25.0 % (19.5 to 31.4) | 75.0 %")
    assert lines[3].endswith("| - |")


def test_plots_are_drawn_from_what_the_run_has(tmp_path):
    save(evaluation("before", {1: 50, 2: 80}, 0), tmp_path)
    assert plot_run(tmp_path) == [tmp_path / "accuracy.png"]
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "reward": 0, "accuracy_first": 0.1, "accuracy_last": 0.2}\n{"step": 2, "rew', encoding="utf-8"
    )
    assert plot_run(tmp_path) == [tmp_path / "accuracy.png", tmp_path / "training.png"]
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")


def test_a_repeated_step_of_a_resumed_run_counts_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "reward": 0}\n{"step": 2, "reward": 1}\n{"step": 2, "reward": 3}\n', encoding="utf-8")
    assert [row["reward"] for row in read_metrics(path)] == [0, 3]
