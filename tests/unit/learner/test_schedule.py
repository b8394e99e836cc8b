import math

import pytest

from services.learner.schedule import lr_at

PAPER = {"total": 10_560, "peak": 5e-7, "warmup": 0.03, "min_ratio": 0.1}


def test_warm_up_is_linear_and_reaches_the_peak_at_step_317_of_the_paper() -> None:
    assert lr_at(0, **PAPER) == pytest.approx(5e-7 / 317)
    assert lr_at(316, **PAPER) == pytest.approx(5e-7)
    assert lr_at(317, **PAPER) == pytest.approx(5e-7)


def test_cosine_is_half_way_between_peak_and_floor_in_the_middle_and_ends_at_the_floor() -> None:
    middle = 317 + (10_560 - 317) / 2
    assert lr_at(math.floor(middle), **PAPER) == pytest.approx(0.55 * 5e-7, rel=1e-3)
    assert lr_at(10_560, **PAPER) == pytest.approx(0.1 * 5e-7)
    assert lr_at(20_000, **PAPER) == pytest.approx(0.1 * 5e-7)


def test_without_warm_up_the_first_step_is_at_the_peak() -> None:
    assert lr_at(0, total=10, peak=1.0, warmup=0.0, min_ratio=0.0) == 1.0


def test_a_run_that_is_all_warm_up_never_divides_by_zero() -> None:
    assert [lr_at(i, total=2, peak=1.0, warmup=1.0, min_ratio=0.1) for i in range(3)] == pytest.approx([0.5, 1.0, 1.0])
