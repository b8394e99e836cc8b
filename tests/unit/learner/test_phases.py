"""Where the learner's time goes."""

import pytest

from services.learner.phases import SECONDS, WINDOW_S, Phases


def test_every_second_is_counted_once_and_shares_are_of_the_last_minute() -> None:
    now = 0.0
    before = {phase: SECONDS.labels(phase)._value.get() for phase in ("waiting", "training")}
    phases = Phases(lambda: now)
    assert phases.shares() == {}
    now = 6.0
    phases.enter("training")
    now = 8.0
    phases.note()
    assert phases.current == "training"
    assert phases.shares() == {"waiting": pytest.approx(0.75), "training": pytest.approx(0.25)}
    now = 6.0 + WINDOW_S + 1
    phases.note()
    assert phases.shares() == {"training": 1.0}
    grown = {phase: SECONDS.labels(phase)._value.get() - value for phase, value in before.items()}
    assert grown == {"waiting": pytest.approx(6.0), "training": pytest.approx(WINDOW_S + 1)}
