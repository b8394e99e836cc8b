"""Problems come out of files as written there, and errors name the file, the line and the setting."""

import json

import pytest

from services.contracts.config import ConfigError, RunConfig
from services.contracts.problems import arithmetic, load_problems
from services.contracts.settings import DataSection, RunSection


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def config(seed=42, **data):
    return RunConfig(run=RunSection(seed=seed), data=DataSection(**data))


def test_arithmetic_working_is_right_column_by_column():
    problems = {problem.question: problem for problem in arithmetic(2)}
    assert len(problems) == 90 * 90
    assert problems["23+48"].gold == ("71",)
    assert problems["23+48"].rationale == "11,7"
    assert all(sum(map(int, q.split("+"))) == int(p.gold[0]) for q, p in problems.items())


def test_split_is_disjoint_complete_and_seeded():
    first = load_problems(config(source="arithmetic", heldout_size=100))
    again = load_problems(config(source="arithmetic", heldout_size=100))
    other = load_problems(config(source="arithmetic", heldout_size=100, seed=7))
    train, heldout = ({p.question for p in side} for side in (first.train, first.heldout))
    assert len(heldout) == 100 and not train & heldout and len(train | heldout) == 8100
    assert first == again
    assert first.heldout != other.heldout


def test_question_columns_are_joined_and_whole_floats_become_integers(tmp_path):
    rows = [{"Body": f"Case {i}.", "Question": "How many?", "Answer": 8.0} for i in range(3)]
    path = jsonl(tmp_path / "svamp.jsonl", rows)
    loaded = load_problems(
        config(source="jsonl", train=path, question_field="Body, Question", answer_field="Answer", heldout_size=1)
    )
    assert {p.question for p in [*loaded.train, *loaded.heldout]} == {f"Case {i}. How many?" for i in range(3)}
    assert loaded.train[0].gold == ("8",)


def test_answer_pattern_finds_the_gold_inside_the_column(tmp_path):
    path = jsonl(tmp_path / "gsm.jsonl", [{"question": str(i), "answer": f"so\n#### {i}"} for i in range(3)])
    loaded = load_problems(config(source="jsonl", train=path, answer_pattern=r"####\s*(.+)", heldout_size=1))
    assert all(p.gold == (p.question,) for p in loaded.train)


def test_a_list_of_golds_is_kept(tmp_path):
    path = jsonl(tmp_path / "d.jsonl", [{"question": str(i), "answer": ["1", "2"]} for i in range(2)])
    assert load_problems(config(source="jsonl", train=path, heldout_size=1)).train[0].gold == ("1", "2")


def test_a_training_problem_that_is_held_out_is_not_trained(tmp_path):
    train = jsonl(tmp_path / "train.jsonl", [{"question": str(i), "answer": i} for i in range(5)])
    heldout = jsonl(tmp_path / "heldout.jsonl", [{"question": "3", "answer": 3}])
    loaded = load_problems(config(source="jsonl", train=train, heldout=heldout))
    assert "3" not in {p.question for p in loaded.train}


@pytest.mark.parametrize(
    ("rows", "data", "message"),
    [
        (
            [{"q": "1", "answer": "1"}],
            {},
            r":1: no column 'question' \(data\.question_field\); columns: q, answer",
        ),
        ([], {}, "the data set is empty"),
        ([{"question": "1", "answer": "x"}], {"answer_pattern": "#(.)"}, r"answer_pattern '#\(\.\)' finds nothing"),
        ([{"question": "1", "answer": "x"}], {"answer_pattern": "#."}, "needs a group"),
        ([{"question": "1", "answer": "x"}], {"answer_pattern": "("}, "not a regular expression"),
        ([{"question": "1", "answer": "x"}], {"heldout_size": 9}, "leaves no training problem"),
    ],
)
def test_bad_data_is_one_clear_error(tmp_path, rows, data, message):
    path = jsonl(tmp_path / "d.jsonl", rows)
    with pytest.raises(ConfigError, match=message):
        load_problems(config(source="jsonl", train=path, **data))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.jsonl: no such data file"):
        load_problems(config(source="jsonl", train=str(tmp_path / "nowhere.jsonl")))


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"question": "1", "answer": "1"}\n{oops\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"d\.jsonl:2: not JSON"):
        load_problems(config(source="jsonl", train=str(path)))
