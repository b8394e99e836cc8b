"""What is asked for, and when it is the same evaluation again; the journal that keeps it."""

import msgspec
import pytest
from evaluation_data import make_dialogue, make_header

from services.contracts.config import ConfigError
from services.contracts.problems import Problem
from services.evaluation.benchmarks import ProblemSet
from services.evaluation.journal import DIALOGUES, Journal, hold, read_dialogues
from services.evaluation.plan import Settings, asks, check, chosen, parse_attempts, problem_id, sampling_seed

PROBLEMS = tuple(Problem(f"q{i}", (str(i),)) for i in range(20))
SET = ProblemSet("mine", "mine", PROBLEMS, 20)


def make_settings(**values):
    return Settings(**{"benchmarks": ("mine",), "attempts": (1, 2), **values})


@pytest.mark.parametrize(
    ("text", "found"), [("1-7", (1, 2, 3, 4, 5, 6, 7)), ("3", (3,)), ("5,1-2, 2", (1, 2, 5)), ("64", (64,))]
)
def test_attempts_are_numbers_and_ranges(text, found):
    assert parse_attempts(text) == found


@pytest.mark.parametrize(
    ("text", "told"),
    [("0-3", "0-3: a dialogue has 1 to 64"), ("65", "65"), ("3-1", "3-1"), ("", "''"), ("a", "'a'"), ("1-", "'1-'")],
)
def test_attempts_that_make_no_sense_are_told(text, told):
    with pytest.raises(ConfigError, match=f"--attempts: .*{told}"):
        parse_attempts(text)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"temperature": 0.0, "seeds": 2}, "--seeds: greedy dialogues are all the same"),
        ({"temperature": -1.0}, "--temperature: -1 is below 0"),
        ({"seeds": 0}, "--seeds: 0: must be 1 to 1000"),
        ({"samples": 2, "sample_temperature": 0.0}, "--sample-temperature"),
        ({"problems": 0}, "--problems: 0"),
        ({"attempts": (65,)}, "--attempts: 65"),
    ],
)
def test_settings_that_make_no_sense_are_told(values, told):
    with pytest.raises(ConfigError, match=told):
        check(make_settings(**values))


def test_single_attempts_are_shared_with_the_independent_samples():
    problems = {"mine": chosen(SET, make_settings())}
    found = asks(make_settings(seeds=2, samples=5), problems)
    assert len(found) == 20 * (2 + 2 + 3)
    assert len(asks(make_settings(seeds=1, samples=5, temperature=0.0), problems)) == 20 * (1 + 1 + 5)


def test_no_two_dialogues_share_a_sampling_seed_nor_a_neighbours():
    found = asks(make_settings(seeds=3, samples=8), {"mine": chosen(SET, make_settings())})
    seeds = {sampling_seed(ask, 42) // 64 for ask in found}
    assert len(seeds) == len(found)
    assert {sampling_seed(ask, 42) for ask in found}.isdisjoint({sampling_seed(ask, 43) for ask in found})


def test_a_part_of_a_benchmark_is_drawn_by_the_seed_in_the_datas_order():
    part = chosen(SET, make_settings(problems=7))
    assert len(part) == 7 and part != dict(list(chosen(SET, make_settings()).items())[:7])
    assert [PROBLEMS.index(problem) for problem in part.values()] == sorted(map(PROBLEMS.index, part.values()))
    assert part == chosen(SET, make_settings(problems=7)) != chosen(SET, make_settings(problems=7, seed=1))
    assert all(problem_id(problem) == identity for identity, problem in part.items())


def test_a_line_that_a_killed_writer_left_unfinished_is_asked_for_again(tmp_path):
    first, second = make_dialogue("a", "wc"), make_dialogue("b", "c")
    with Journal(tmp_path, make_header()) as journal:
        journal.add(first)
        journal.add(second)
    path = tmp_path / DIALOGUES
    path.write_bytes(path.read_bytes()[:-5])
    assert read_dialogues(tmp_path) == [first]
    with Journal(tmp_path, make_header()) as journal:
        assert list(journal.done) == [first.key]
        journal.add(second)
    assert read_dialogues(tmp_path) == [first, second]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"weights": {"sha256": "11"}}, "weights.sha256: 00 there, 11 here"),
        ({"settings": make_settings(benchmarks=("amc23",), seeds=1, seed=7)}, "settings.seed: 42 there, 7 here"),
        ({"data": {"amc23": "e"}}, "data.amc23: d there, e here"),
        ({"dialogue": {"template": "paper"}}, "dialogue: None there, {'template': 'paper'} here"),
    ],
)
def test_another_evaluation_is_not_gone_on_with(tmp_path, change, told):
    with Journal(tmp_path, make_header()):
        pass
    with pytest.raises(ConfigError, match=f"holds another evaluation: {told}"):
        Journal(tmp_path, msgspec.structs.replace(make_header(), **change)).__enter__()


def test_two_cannot_write_to_one_folder(tmp_path):
    with hold(tmp_path), pytest.raises(ConfigError, match="another evaluation is writing to"), hold(tmp_path):
        pass
    with hold(tmp_path):
        pass


def test_a_line_that_is_no_dialogue_is_named(tmp_path):
    (tmp_path / DIALOGUES).write_text('{"benchmark": 1}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"dialogues\.jsonl:1: not a dialogue"):
        read_dialogues(tmp_path)
