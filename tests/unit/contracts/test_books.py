"""The books: ranges, fates, and an audit that finds what is in no state and what is in two."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.contracts.books import (
    DEAD,
    LOST_BY_REDIS,
    SPARE,
    STALE,
    Books,
    Snapshot,
    TaskRef,
    examine,
    format_ranges,
    missing,
    parse_ranges,
    trained_in,
)

BOOKS = Books().add([*((i, trained_in(1)) for i in (0, 1, 3)), (2, STALE), *((i, trained_in(2)) for i in (4, 5))])


def snapshot(**changes: object) -> Snapshot:
    """Books through version 2 and task 5; then 6 and 7 queued, 8 running, 9 a trajectory, 10 dropped."""
    clean = Snapshot(
        next_task=11,
        durable=2,
        queued=[TaskRef(6, 2), TaskRef(7, 3)],
        running=[TaskRef(8, 2)],
        trajectories={"1-0": TaskRef(9, 2)},
        settled={10: STALE},
        dead=[],
    )
    return clean._replace(**changes)


def audit(books: Books = BOOKS, **changes: object):
    return examine(books, snapshot(**changes), version=2, next_task=6)


@given(st.sets(st.integers(0, 60)))
def test_ranges_are_read_as_they_were_written(ids: set[int]) -> None:
    assert [i for one in parse_ranges(format_ranges(ids)) for i in one] == sorted(ids)


def test_ranges_are_short() -> None:
    assert format_ranges([3, 1, 0, 2, 7]) == "0-3,7"
    assert format_ranges([]) == ""


@given(st.lists(st.tuples(st.integers(0, 40), st.sampled_from([STALE, SPARE, trained_in(1), trained_in(2)]))))
def test_the_books_find_their_own(fates: list[tuple[int, str]]) -> None:
    books = Books()
    for i in range(0, len(fates), 3):
        books = books.add(fates[i : i + 3])
    assert books.among(range(50)) == {task_id for task_id, _ in fates}
    assert books.among([]) == set()


def test_the_books_grow_by_steps_and_not_by_tasks() -> None:
    books = Books()
    for step in range(1, 101):
        books = books.add((task_id, trained_in(step)) for task_id in range(256 * (step - 1), 256 * step))
    assert sum(map(len, books.trained.values())) < 100 * len("25344-25599,")


def test_one_drop_is_written_once() -> None:
    assert Books().add([(3, STALE)]).add([(3, STALE)]) == Books(dropped={STALE: "3"})


def test_a_clean_run_adds_up() -> None:
    found = audit()
    assert found.is_clean and found.leftovers == 0
    assert found.states == {
        "queued": 2,
        "running": 1,
        "trajectory waiting": 1,
        STALE: 2,
        trained_in(1): 3,
        trained_in(2): 2,
    }
    assert sum(found.states.values()) == found.issued == 11


@pytest.mark.parametrize(
    ("changes", "task_id"),
    [
        ({"queued": [TaskRef(6, 2)]}, 7),
        ({"running": []}, 8),
        ({"trajectories": {}}, 9),
        ({"settled": {}}, 10),
        ({"next_task": 12}, 11),
    ],
)
def test_a_task_in_no_state_is_found(changes: dict[str, object], task_id: int) -> None:
    assert audit(**changes).unaccounted == [task_id]


@pytest.mark.parametrize(
    ("changes", "conflict"),
    [
        ({"running": [TaskRef(8, 2), TaskRef(7, 3)]}, {7: ["queued", "running"]}),
        ({"trajectories": {"1-0": TaskRef(9, 2), "2-0": TaskRef(9, 2)}}, {9: ["trajectory waiting"] * 2}),
        ({"trajectories": {"1-0": TaskRef(9, 2), "2-0": TaskRef(4, 2)}}, {4: ["trajectory waiting", trained_in(2)]}),
        ({"settled": {10: STALE, 3: STALE}}, {3: [STALE, trained_in(1)]}),
        ({"dead": [5]}, {5: [DEAD, trained_in(2)]}),
        ({"queued": [TaskRef(6, 2), TaskRef(7, 3), TaskRef(20, 3)]}, {20: ["queued", "never issued"]}),
    ],
)
def test_a_task_in_two_states_is_found(changes: dict[str, object], conflict: dict[int, list[str]]) -> None:
    assert audit(**changes).conflicts == conflict


@pytest.mark.parametrize("step", [1, 2])
def test_a_task_trained_twice_is_found(step: int) -> None:
    twice = BOOKS.add([(4, trained_in(step))])
    assert audit(twice).conflicts == {4: sorted([trained_in(step), trained_in(2)])}


def test_what_a_checkpoint_settles_may_still_be_in_redis_but_is_no_state() -> None:
    found = audit(trajectories={"1-0": TaskRef(9, 2), "0-1": TaskRef(4, 1)}, queued=[*snapshot().queued, TaskRef(2, 0)])
    assert found.is_clean and found.leftovers == 2
    unknown = audit(Books().add([(i, trained_in(1)) for i in (0, 1, 2, 3, 4)]), running=[TaskRef(8, 2), TaskRef(5, 1)])
    assert unknown.unaccounted == [5]


def test_a_fate_in_the_ledger_and_in_the_books_is_one_fate() -> None:
    assert audit(settled={10: STALE, 2: STALE}).is_clean
    assert audit(settled={10: DEAD}, dead=[10]).is_clean


def test_what_nobody_knows_is_missing() -> None:
    assert missing(BOOKS, snapshot(), 13) == [11, 12]
    assert missing(BOOKS, snapshot(settled={10: LOST_BY_REDIS}, queued=[]), 11) == [6, 7]
