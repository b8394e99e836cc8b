from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from services.contracts.problems import Problem
from services.learner.sampler import TaskSampler, epoch_order, group_of

PROBLEMS = [Problem(f"question {i}", (str(i),)) for i in range(37)]


def make(seed: int = 1) -> TaskSampler:
    return TaskSampler(PROBLEMS, seed=seed, min_attempts=1, max_attempts=5)


def test_a_task_is_a_pure_function_of_seed_and_number() -> None:
    forward = [make().task(i, batch=0, min_version=0) for i in range(100)]
    backward = [make().task(i, batch=0, min_version=0) for i in reversed(range(100))]
    assert forward == backward[::-1]


def test_each_epoch_is_another_permutation_of_the_problems() -> None:
    sampler = make()
    questions = [sampler.task(i, batch=0, min_version=0).problem for i in range(3 * len(PROBLEMS))]
    epochs = [questions[i * len(PROBLEMS) : (i + 1) * len(PROBLEMS)] for i in range(3)]
    assert all(sorted(epoch) == sorted(p.question for p in PROBLEMS) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_another_seed_gives_other_tasks() -> None:
    assert make(1).task(0, batch=0, min_version=0).seed != make(2).task(0, batch=0, min_version=0).seed
    assert list(epoch_order(1, 0, 37)) != list(epoch_order(2, 0, 37))


def test_allowed_attempts_are_uniform_between_the_bounds() -> None:
    counts = Counter(make().task(i, batch=0, min_version=0).max_attempts for i in range(5000))
    assert sorted(counts) == [1, 2, 3, 4, 5]
    assert all(abs(count - 1000) < 150 for count in counts.values())  # 5 standard deviations


def test_gold_answers_travel_with_the_question() -> None:
    task = make(-3).task(7, batch=4, min_version=2)
    assert task.gold == (task.problem.removeprefix("question "),)
    assert (task.batch, task.min_version) == (4, 2)


def make_groups(samples_per_problem: int, seed: int = 1) -> TaskSampler:
    return TaskSampler(PROBLEMS, seed=seed, min_attempts=1, max_attempts=5, samples_per_problem=samples_per_problem)


def test_the_members_of_a_group_differ_in_nothing_but_their_seeds() -> None:
    tasks = [make_groups(4).task(i, batch=2, min_version=1) for i in range(400)]
    for start in range(0, 400, 4):
        group = tasks[start : start + 4]
        assert {group_of(task.task_id, 4) for task in group} == {start // 4}
        assert len({(task.problem, task.gold, task.max_attempts, task.batch, task.min_version) for task in group}) == 1
        seeds = [(task.seed + k) % 2**31 for task in group for k in range(task.max_attempts)]
        assert len(set(seeds)) == len(seeds)  # of every attempt of every member


def test_groups_go_through_the_problems_like_single_tasks_do() -> None:
    single, groups = make(), make_groups(3)
    for i in range(100):
        task, first = single.task(i, batch=0, min_version=0), groups.task(3 * i, batch=0, min_version=0)
        assert (first.problem, first.max_attempts, first.seed) == (task.problem, task.max_attempts, task.seed)


@given(st.integers(1, 16), st.lists(st.integers(1, 100), max_size=20))
def test_groups_are_issued_whole_whatever_was_lost(size: int, losses: list[int]) -> None:
    first = 0
    for missing in losses:
        count = make_groups(size).count(first, missing)
        assert missing <= count < missing + size
        first += count
        assert first % size == 0
