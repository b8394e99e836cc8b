from contextlib import ExitStack

from hypothesis import given
from hypothesis import strategies as st

from services.rollout.occupancy import IDLE, Occupancy

BEGIN, END = "begin", "end"


def seconds() -> list[float]:
    return [IDLE.labels(because)._value.get() for because in ("grading", "tasks")]


@given(
    st.lists(st.tuples(st.sampled_from([BEGIN, END]), st.sampled_from(["sampling", "judging"]), st.integers(0, 9))),
)
def test_time_without_an_attempt_to_sample_counts_for_what_the_dialogues_wait_for(
    events: list[tuple[str, str, int]],
) -> None:
    now, grading, tasks = 0, 0, 0
    occupancy = Occupancy(lambda: now)
    under_way: dict[str, list[ExitStack]] = {"sampling": [], "judging": []}
    before = seconds()
    for what, kind, pause in events:
        now += pause
        if not under_way["sampling"]:
            grading, tasks = (grading + pause, tasks) if under_way["judging"] else (grading, tasks + pause)
        if what == BEGIN or not under_way[kind]:
            stack = ExitStack()
            stack.enter_context(getattr(occupancy, kind)())
            under_way[kind].append(stack)
        else:
            under_way[kind].pop().close()
    assert [after - then for after, then in zip(seconds(), before, strict=True)] == [grading, tasks]
