"""The parts of a step: one at a time, none lost."""

import pytest

from services.learner import stopwatch
from services.learner.stopwatch import STEP_PARTS, Stopwatch, step_seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the clock shows, to be set by the test."""
    now = [0.0]
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: now[0])
    return now


def test_every_moment_belongs_to_one_part(clock: list[float]) -> None:
    watch = Stopwatch()
    clock[0] = 1.0
    with watch.during("update"):
        clock[0] = 3.0
        watch.enter("backward")
        clock[0] = 7.0
    clock[0] = 8.0
    assert watch.lap() == {"other": 2.0, "update": 2.0, "backward": 4.0}
    clock[0] = 8.5
    assert watch.lap() == {"other": 0.5}


def test_a_step_is_the_loops_parts_with_the_updates_own_in_place_of_its_whole() -> None:
    of_loop = {"wait": 2.0, "update": 10.0, "publish": 0.5, "other": 0.25}
    of_update = {"forward_s": 4.0, "backward_s": 5.0, "publish_s": 0.25, "other_s": 0.125, "update_s": 9.375, "lr": 1.0}
    step = step_seconds(of_loop, of_update)
    assert step["forward_s"] == 4.0 and step["publish_s"] == 0.75 and step["wait_s"] == 2.0
    assert step["other_s"] == pytest.approx(0.25 + 10.0 - 9.25)  # the update's own rest, and the way to it and back
    assert step["step_s"] == pytest.approx(sum(of_loop.values())) == sum(step[f"{part}_s"] for part in STEP_PARTS)
