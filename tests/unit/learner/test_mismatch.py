import msgspec
import numpy as np
import pytest
from learner_data import make_trajectory

from services.contracts.wire import VersionSpan
from services.learner.mismatch import is_hopeless, per_dialogue, staleness


def test_a_dialogue_is_hopeless_past_the_limit_or_when_it_is_no_number() -> None:
    delta = np.array([1.0, -2.0, 0.5, 3.0, 0.0, np.nan, 0.0, -np.inf], dtype=np.float32)
    mean = per_dialogue(delta, np.array([0, 2, 3, 5, 7, 8]))
    np.testing.assert_array_equal(mean, [1.5, 0.5, 1.5, np.nan, np.inf])
    assert is_hopeless(mean, limit=1.5).tolist() == [False, False, False, True, True]
    assert is_hopeless(mean, limit=1.0).tolist() == [True, False, True, True, True]
    assert per_dialogue(np.zeros(0, np.float32), np.array([0])).shape == (0,)


def test_staleness_is_a_histogram_of_tokens() -> None:
    one = msgspec.structs.replace(make_trajectory(0), versions=(VersionSpan(7, 0, 3), VersionSpan(5, 5, 6)))
    other = msgspec.structs.replace(make_trajectory(1), versions=(VersionSpan(0, 0, 4),))
    assert staleness([one, other], version=7) == {"staleness_0": 3 / 8, "staleness_2": 1 / 8, "staleness_7": 4 / 8}
    assert staleness([other], version=30) == {"staleness_8": pytest.approx(1.0)}
