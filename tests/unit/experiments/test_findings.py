"""What may be claimed: only what problems and trainings agree on; and how fast reward rises."""

import pytest

from experiments.findings import Finding, find, findings, progress, sampled_tokens
from services.evaluation.compare import Evaluated
from services.evaluation.statistics import Estimate
from tests.evaluation_data import make_dialogue, make_header


def finding(low, high, by_training):
    nothing = Estimate(0.5, 0.4, 0.6)
    difference = Estimate((low + high) / 2, low, high)
    return Finding("gain", 2, nothing, nothing, difference, 0.01, by_training)


@pytest.mark.parametrize(
    ("low", "high", "by_training", "verdict"),
    [
        (0.01, 0.05, (0.02, 0.03, 0.01), "reproduced"),
        (-0.05, -0.01, (-0.02, -0.03, -0.01), "contradicted"),
        (-0.01, 0.05, (0.02, 0.03, 0.01), "not settled"),
        (0.01, 0.05, (0.02, 0.06, -0.01), "not settled"),
        (-0.05, -0.01, (-0.02, 0.01, -0.06), "not settled"),
    ],
)
def test_a_claim_is_settled_by_problems_and_every_pair_of_trainings(low, high, by_training, verdict):
    assert finding(low, high, by_training).verdict == verdict


def evaluated(name, verdicts_of_two, verdicts_of_one="ww"):
    """One training's evaluation of two problems: with N = 1, and with N = 2."""
    ones = [make_dialogue(f"p{i}", letter, n=1) for i, letter in enumerate(verdicts_of_one)]
    twos = [make_dialogue(f"p{i}", letters, n=2) for i, letters in enumerate(verdicts_of_two)]
    return Evaluated(make_header(model=name), [*ones, *twos])


def test_two_arms_are_compared_pooled_and_training_by_training():
    base = [evaluated("base-1", ("ww", "ww")), evaluated("base-2", ("wc", "ww"))]
    multi = [evaluated("multi-1", ("wc", "wc")), evaluated("multi-2", ("wc", "ww"))]
    gain = find(findings(base, multi), "gain", 2)
    assert gain.by_training == (1.0, 0.0)
    assert (gain.first.value, gain.second.value) == (0.25, 0.75)
    assert gain.difference.value == 0.5
    assert find(findings(base, multi), "accuracy", 1).difference.value == 0.0


def rows(rewards, seconds=2.0):
    return [{"reward": r, "step_s": seconds, "staleness_mean": 1.0, "dialogues": 4.0, "response_tokens": 10.0}
            for r in rewards]  # fmt: skip


def test_reward_is_smoothed_over_five_updates_against_the_clock():
    course = progress(rows([0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0]))
    assert course.seconds == (2, 4, 6, 8, 10, 12, 14)
    assert course.smoothed == pytest.approx((0, 0, 0, 0, 0.2, 0.4, 0.6))
    assert course.seconds_to(0.4) == 12
    assert course.seconds_to(0.7) is None
    assert course.staleness == 1.0


def test_a_lucky_first_update_is_no_reward_reached():
    assert progress(rows([1.0, 0.0, 0.0, 0.0, 0.0, 0.0])).seconds_to(0.5) is None


def test_tokens_are_those_of_all_dialogues():
    assert sampled_tokens(rows([0.0, 0.0])) == 80.0
