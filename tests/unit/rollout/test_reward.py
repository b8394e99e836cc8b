"""The reward table of design section 3, row by row."""

import pytest

from services.contracts.settings import DialogueSection
from services.contracts.wire import Verdict
from services.rollout.reward import reward

C, W, N, T = Verdict.CORRECT, Verdict.INCORRECT, Verdict.NO_ANSWER, Verdict.TIMEOUT


@pytest.mark.parametrize(
    ("verdicts", "last", "paper"),
    [
        ([C], 1.0, 1.0),
        ([W, N, C], 1.0, 1.0),
        ([W], -0.5, -0.5),
        ([N], -1.0, -1.0),
        ([T], -0.5, -0.5),
        ([N, W], -0.5, -0.5),
        ([W, N], -1.0, -0.5),  # the paper's reward never falls back
        ([T, N], -1.0, -0.5),
        ([N, N], -1.0, -1.0),
        ([], -1.0, -1.0),
    ],
)
def test_reward_goes_by_the_table(verdicts, last, paper):
    assert reward(verdicts, DialogueSection(reward="last")) == last
    assert reward(verdicts, DialogueSection(reward="paper")) == paper


def test_a_later_success_is_discounted_once_per_failed_attempt():
    settings = DialogueSection(attempt_discount=0.5)
    assert [reward([W] * k + [C], settings) for k in range(3)] == [1.0, 0.5, 0.25]


def test_failure_is_not_discounted():
    assert reward([W, W, W], DialogueSection(attempt_discount=0.5)) == -0.5
