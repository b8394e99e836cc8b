"""What each benchmark's fields become; the whole sets where their files are beside the repository."""

import json
from pathlib import Path

import pytest

from services.contracts.config import ConfigError, load
from services.evaluation import benchmarks
from services.evaluation.benchmarks import KNOWN, after_hashes, as_number, first_of_list, last_box, without_unit

FOLDERS = (Path(__file__).parents[4] / "shared" / "data", Path("/work/shared/data"))
DATA = next((folder for folder in FOLDERS if folder.is_dir()), None)
CONFIG = load(None, ["--data.heldout_size=5"], env={})


@pytest.mark.parametrize(
    ("function", "value", "gold"),
    [
        (as_number, 27.0, "27"),
        (as_number, "025", "25"),
        (as_number, -1.0, "-1"),
        (as_number, 0.6666666667, "0.6666666667"),
        (after_hashes, "so 5 * 425\n#### 2,125", "2125"),
        (without_unit, "9 (apples)", "9"),
        (without_unit, "14  (seats)", "14"),
        (without_unit, "-(1/3)", "-(1/3)"),
        (without_unit, "3:30 p.m.", "3:30 p.m."),
        (last_box, r"$\boxed{1}$, then $x=\boxed{\frac{1}{\sqrt{2}}}$ km", r"\frac{1}{\sqrt{2}}"),
        (last_box, r"it is \boxed{\text{east}}.", r"\text{east}"),
        (last_box, r"\boxed{(a+5)(b+2)} and \boxed{open", "(a+5)(b+2)"),
        (last_box, r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (last_box, r"\boxed{np.arcsin(10/13)}", "arcsin(10/13)"),
        (last_box, "9.6", "9.6"),
        (first_of_list, ["$69$,$84$"], "$69$,$84$"),
    ],
)
def test_a_field_becomes_the_gold_answer(function, value, gold):
    assert function(value) == (gold,)


@pytest.mark.skipif(DATA is None, reason="the files of the benchmarks are not beside the repository")
@pytest.mark.parametrize("name", KNOWN)
def test_a_set_is_whole_and_asks_each_question_once(name):
    found = benchmarks.load(name, folder=DATA, config=CONFIG)
    assert found.num_rows == KNOWN[name].file.count
    assert len({problem.question for problem in found.problems}) == len(found.problems)
    assert all(gold and "boxed" not in gold for problem in found.problems for gold in problem.gold)


@pytest.mark.skipif(DATA is None, reason="the files of the benchmarks are not beside the repository")
def test_the_references_losses_are_not_ours():
    """MATH500 rows 97 and 102 lose text there; OlympiadBench is its last half, twice."""
    golds = [problem.gold[0] for problem in benchmarks.load("math500", folder=DATA, config=CONFIG).problems]
    assert (golds[97], golds[102]) == (r"\text{east}", "(a+5)(b+2)")
    assert len(benchmarks.load("olympiadbench", folder=DATA, config=CONFIG).problems) == 675


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_half_a_benchmark_is_refused(tmp_path):
    write(tmp_path / "aime24.jsonl", [{"problem": f"p{i}", "answer": "1"} for i in range(15)])
    with pytest.raises(ConfigError, match="aime24: 15 rows, AIME 2024 has 30"):
        benchmarks.load("aime24", folder=tmp_path, config=CONFIG)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"problem": "p"}, r"aime24\.jsonl:1: no field 'answer'; fields: problem"),
        ({"problem": "p", "answer": "x"}, r"aime24\.jsonl:1: answer: could not convert"),
        ({"problem": " ", "answer": "1"}, r"aime24\.jsonl:1: the question is empty"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path, row, told):
    write(tmp_path / "aime24.jsonl", [row])
    with pytest.raises(ConfigError, match=told):
        benchmarks.load("aime24", folder=tmp_path, config=CONFIG)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("aime25", "unknown benchmark 'aime25'; known: aime24, amc23, .*heldout"),
        ("aime24", r"--data: .*aime24\.jsonl: no such file"),
        ("gsm8k=other.jsonl", "expected NAME=FILE.jsonl .* NAME a new one"),
        ("mine=gone.jsonl", r"gone\.jsonl: no such data file"),
    ],
)
def test_what_is_not_there_is_told(tmp_path, name, told):
    with pytest.raises(ConfigError, match=told):
        benchmarks.load(name, folder=tmp_path, config=CONFIG)


def test_a_file_of_ones_own_is_read_by_the_fields_of_data(tmp_path):
    rows = [{"q": "a", "gold": [1.0, "one"]}, {"q": "b", "gold": 2}, {"q": "a", "gold": 1}]
    write(tmp_path / "mine.jsonl", rows)
    config = load(None, ["--data.question_field=q", "--data.answer_field=gold"], env={})
    found = benchmarks.load(f"mine={tmp_path / 'mine.jsonl'}", folder=None, config=config)
    assert (found.name, found.num_rows) == ("mine", 3)
    assert [(problem.question, problem.gold) for problem in found.problems] == [("a", ("1", "one")), ("b", ("2",))]


def test_heldout_are_the_problems_that_the_run_does_not_train_on():
    assert len(benchmarks.load("heldout", folder=None, config=CONFIG).problems) == 5


def test_a_set_that_is_on_no_hub_wants_its_folder():
    with pytest.raises(ConfigError, match="mawps: no copy on the hub has its problems; give its folder by --data"):
        benchmarks.load("mawps", folder=None, config=CONFIG)
