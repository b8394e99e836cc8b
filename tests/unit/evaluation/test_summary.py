"""Figures of a few dialogues, computed by hand; the page and the pictures that are made of them."""

import pytest
from evaluation_data import make_dialogue, make_header

from services.contracts.config import ConfigError
from services.evaluation.compare import Evaluated, compare, pool
from services.evaluation.compare import markdown as comparison_page
from services.evaluation.figures import draw
from services.evaluation.report import markdown
from services.evaluation.summary import repeats, summarise

TWO = [
    make_dialogue("a", "c"), make_dialogue("b", "w"), make_dialogue("c", "n"), make_dialogue("d", "c"),
    make_dialogue("a", "c", n=2), make_dialogue("b", "wc"), make_dialogue("c", "ww", answers=["5", " 5"]),
    make_dialogue("d", "wn"),
]  # fmt: skip


def test_a_point_is_what_its_dialogues_say():
    curve = summarise(make_header(), TWO).curves["amc23"]
    one, two = curve.points
    assert (curve.num_problems, one.accuracy.value, two.accuracy.value) == (4, 0.5, 0.5)
    assert (two.accuracy_first.value, two.recovered.value) == (0.25, pytest.approx(1 / 3))
    assert two.repeated.value == pytest.approx(1 / 3)
    assert (two.tokens_per_dialogue, two.tokens_per_solved.value, two.attempts_mean) == (17.5, 35.0, 1.75)
    assert two.verdicts == {"correct": 2, "incorrect": 4, "no_answer": 1}
    assert one.recovered.value is None


def test_seeds_are_averaged_before_problems_are():
    dialogues = [
        make_dialogue(p, v, seed=s) for p, s, v in [("a", 0, "c"), ("a", 1, "w"), ("b", 0, "c"), ("b", 1, "c")]
    ]
    [point] = summarise(make_header(attempts=(1,), seeds=2), dialogues).curves["amc23"].points
    assert (point.accuracy.value, point.accuracy_by_seed) == (0.75, (1.0, 0.5))
    assert (point.accuracy.low, point.accuracy.high) == (0.5, 1.0)


def test_dialogues_are_compared_with_resampling_for_as_many_tokens():
    """Two samples of each problem, 10 tokens each: a is solved by half of them, b never."""
    samples = [make_dialogue("a", "c"), make_dialogue("a", "w", seed=1)]
    samples += [make_dialogue("b", "w"), make_dialogue("b", "w", seed=1)]
    dialogues = [make_dialogue("a", "wc"), make_dialogue("b", "ww")]
    curve = summarise(make_header(attempts=(1, 2), samples=2), [*samples, *dialogues]).curves["amc23"]
    assert [(p.accuracy.value, p.tokens) for p in curve.pass_at] == [(0.25, 10.0), (0.5, 17.5)]
    same = curve.points[1].same_tokens
    assert same.samples is None and same.gain.value is None  # 20 tokens: more than two samples cost
    cheaper = [make_dialogue("a", "c", n=2), make_dialogue("b", "ww")]
    same = summarise(make_header(samples=2), [*samples, *cheaper]).curves["amc23"].points[1].same_tokens
    assert same.samples == pytest.approx(1 + 2 / 3)
    assert same.accuracy.value == pytest.approx(0.25 + 0.25 * 2 / 3)
    assert same.gain.value == pytest.approx(0.5 - same.accuracy.value)


def test_where_verdicts_are_kept_the_last_answer_counts():
    dialogues = [make_dialogue("a", "cw"), make_dialogue("b", "wc")]
    header = make_header(attempts=(2,), feedback="none", samples=0)
    results = summarise(header, dialogues)
    [point] = results.curves["amc23"].points
    assert (point.accuracy.value, point.accuracy_any.value, point.same_tokens) == (0.5, 1.0, None)
    assert "50.0 (0.0 to 100.0) [100.0]" in markdown(results)


def test_an_attempt_repeats_the_wrong_answer_before_it():
    assert repeats(make_dialogue("a", "wwwc", answers=["1", "$1$", "2", "3"])) == (1, 3)
    assert repeats(make_dialogue("a", "nwn")) == (0, 1)
    assert repeats(make_dialogue("a", "c")) == (0, 0)


def test_a_dialogue_that_is_missing_is_not_passed_over():
    with pytest.raises(ValueError, match="problem d: 0 of 1 dialogues with 2 attempts"):
        summarise(make_header(), TWO[:-1])


def test_a_refused_dialogue_is_unsolved_and_told():
    dialogues = [make_dialogue("a", "c"), make_dialogue("b", "", n=1, refused="the prompt has 999 tokens")]
    results = summarise(make_header(attempts=(1,)), dialogues)
    assert results.curves["amc23"].points[0].accuracy.value == 0.5
    assert "AMC 2023, 1 allowed attempt: 1 of 2 dialogues could not be run (counted unsolved)" in markdown(results)


def test_the_page_has_the_papers_curves_where_the_benchmark_is_its_own():
    page = markdown(summarise(make_header(), TWO))
    assert "| AMC 2023 | 4 | 50.0 (0.0 to 100.0) | 50.0 (0.0 to 100.0) |" in page
    assert "| *paper, multi-attempt* |  | *60.0* | *72.5* |" in page
    other = [make_dialogue(d.problem_id, "c", n=d.max_attempts, benchmark="mine") for d in TWO]
    assert "paper" not in markdown(summarise(make_header(("mine",)), other))


def test_the_average_is_of_benchmarks_not_of_problems(tmp_path):
    more = [make_dialogue(p, "w", n=n, benchmark="mine") for p in "efghijkl" for n in (1, 2)]
    results = summarise(make_header(("amc23", "mine")), [*TWO, *more])
    assert [point.accuracy.value for point in results.average] == [0.25, 0.25]
    drawn = draw([results], tmp_path)
    assert [path.name for path in drawn] == ["benchmarks.png", "average.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_two_models_are_paired_by_problem():
    """The second solves b at the first attempt too, and all but d at the second."""
    better = [
        *(make_dialogue(p, v) for p, v in zip("abcd", "ccwc", strict=True)),
        *(make_dialogue(p, v, n=2) for p, v in zip("abcd", ("c", "c", "wc", "wc"), strict=True)),
    ]
    comparison = compare(Evaluated(make_header(model="old"), TWO), Evaluated(make_header(model="new"), better))
    accuracy, two, gain = comparison.rows
    assert (accuracy.max_attempts, accuracy.difference.value, accuracy.p) == (1, 0.25, 1.0)
    assert (two.first.value, two.second.value, two.difference.value, two.p) == (0.5, 1.0, 0.5, 0.5)
    assert (gain.figure, gain.first.value, gain.second.value, gain.difference.value) == ("gain", 0.0, 0.25, 0.25)
    page = comparison_page(comparison)
    assert page.startswith("# new against old") and "| amc23 | 2 | 50.0" in page and "differ in more" not in page


def test_only_problems_that_both_were_asked_are_compared():
    fewer = [dialogue for dialogue in TWO if dialogue.problem_id in "ab"]
    comparison = compare(Evaluated(make_header(), TWO), Evaluated(make_header(temperature=1.0), fewer))
    assert {row.num_problems for row in comparison.rows} == {2}
    assert all(row.difference.value == 0.0 and row.p == 1.0 for row in comparison.rows)


def test_several_trainings_are_pooled_as_seeds_of_one():
    ones = [dialogue for dialogue in TWO if dialogue.max_attempts == 1]
    parts = [Evaluated(make_header(attempts=(1,), seeds=1, samples=3, model=name), ones) for name in ("x", "y")]
    parts[1] = Evaluated(parts[1].header, [make_dialogue(p, "c") for p in "abcd"])
    pooled = pool(parts)
    assert (pooled.header.model, pooled.header.settings.seeds, len(pooled.dialogues)) == ("x + y", 2, 8)
    [point] = summarise(pooled.header, pooled.dialogues).curves["amc23"].points
    assert (point.accuracy.value, point.accuracy_by_seed) == (0.75, (0.5, 1.0))
    assert pool(parts[:1]) is parts[0]
    with pytest.raises(ConfigError, match="x and z cannot be pooled: other temperature"):
        pool([parts[0], Evaluated(make_header(attempts=(1,), model="z", temperature=0.0), ones)])


def test_other_data_under_the_same_name_is_not_compared():
    other = [make_dialogue(d.problem_id, "c", n=d.max_attempts, gold=("8",)) for d in TWO]
    with pytest.raises(ConfigError, match="other answers to problem"):
        compare(Evaluated(make_header(), TWO), Evaluated(make_header(), other))
    with pytest.raises(ConfigError, match="no benchmark in common"):
        compare(Evaluated(make_header(), TWO), Evaluated(make_header(("gsm8k",)), TWO))
