import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from services.learner.advantage import Moments, gae, group_advantages, moments, returns_to_go, whiten


def slow_gae(
    values: NDArray[np.float64], reward: float, is_feedback: NDArray[np.bool_], gamma: float, lam: float
) -> NDArray[np.float64]:
    """The definition over the whole response: a sum over later steps, where a step into feedback discounts nothing.

    At feedback the critic stands for the next action's value, and nothing is learnt: delta is 0 there.
    """
    length = len(values)
    ahead = np.zeros(length + 1)  # value of the rest of the dialogue from position t on
    for t in reversed(range(length)):
        ahead[t] = ahead[t + 1] if is_feedback[t] else values[t]
    delta = np.zeros(length)
    for t in np.flatnonzero(~is_feedback):
        is_last = bool(is_feedback[t + 1 :].all())
        delta[t] = reward * is_last + gamma * ahead[t + 1] - values[t]
    advantages = np.zeros(length)
    for t in np.flatnonzero(~is_feedback):
        weight = 1.0
        for u in range(t, length):
            advantages[t] += weight * delta[u]
            weight *= 1.0 if u + 1 < length and is_feedback[u + 1] else gamma * lam
    return advantages


@st.composite
def dialogues(draw: st.DrawFn) -> tuple[list[NDArray[np.float64]], list[NDArray[np.bool_]], list[float]]:
    seed = draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    values, feedback, rewards = [], [], []
    for _ in range(draw(st.integers(1, 5))):
        length = int(random.integers(1, 30))
        mask = random.random(length) < 0.3
        mask[random.integers(length)] = False  # at least one action
        values.append(random.normal(size=length))
        feedback.append(mask)
        rewards.append(float(random.choice([1.0, -0.5, -1.0])))
    return values, feedback, rewards


@settings(max_examples=200, deadline=None)
@given(dialogues(), st.floats(0.5, 1.0), st.floats(0.0, 1.0))
def test_gae_is_the_slow_loop_with_feedback_tokens_deleted(drawn, gamma: float, lam: float) -> None:  # type: ignore[no-untyped-def]
    values, feedback, rewards = drawn
    kept = [v[~mask] for v, mask in zip(values, feedback, strict=True)]
    offsets = np.concatenate([[0], np.cumsum([len(v) for v in kept])]).astype(np.int64)
    earned = np.zeros(offsets[-1])
    earned[offsets[1:] - 1] = rewards
    advantages, returns = gae(earned, np.concatenate(kept), offsets, gamma=gamma, lam=lam)
    slow = [slow_gae(v, r, mask, gamma, lam)[~mask] for v, r, mask in zip(values, rewards, feedback, strict=True)]
    np.testing.assert_allclose(advantages, np.concatenate(slow), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(returns, advantages + np.concatenate(kept))


def test_gae_by_hand() -> None:
    # delta_1 = 1 - 0.5 = 0.5; delta_0 = 0.5 - 0.2 = 0.3; A_0 = 0.3 + 0.99 * 0.5
    advantages, returns = gae(np.array([0.0, 1.0]), np.array([0.2, 0.5]), np.array([0, 2]), gamma=1.0, lam=0.99)
    np.testing.assert_allclose(advantages, [0.795, 0.5])
    np.testing.assert_allclose(returns, [0.995, 1.0])


def test_whitening_by_hand_uses_the_biased_variance() -> None:
    values = np.array([1.0, 2.0, 3.0, 6.0])  # mean 3, variance 14 / 4
    np.testing.assert_allclose(whiten(values, moments(values)), (values - 3) / np.sqrt(3.5), rtol=1e-6)


def test_moments_of_ranks_add_up_to_those_of_the_whole() -> None:
    whole = np.random.default_rng(0).normal(5, 2, 1000)
    added = Moments(*np.sum([moments(part) for part in np.array_split(whole, 3)], axis=0))
    assert added.mean == pytest.approx(whole.mean())
    assert added.variance == pytest.approx(whole.var())


def test_equal_advantages_become_zero_instead_of_infinite() -> None:
    assert np.all(whiten(np.full(5, 0.7), moments(np.full(5, 0.7))) == pytest.approx(0.0, abs=1e-3))
    assert whiten(np.zeros(0), moments(np.zeros(0))).shape == (0,)


def test_a_reward_in_the_middle_counts_for_the_actions_up_to_it() -> None:
    # Two attempts of two actions, -0.5 and +1 at their ends, no critic: what is still to come, discounted by 0.5.
    rewards = np.array([0.0, -0.5, 0.0, 1.0])
    np.testing.assert_allclose(
        returns_to_go(rewards, np.array([0, 4]), gamma=0.5), [-0.25 + 0.125, -0.5 + 0.25, 0.5, 1.0]
    )


def test_returns_do_not_cross_into_another_dialogue() -> None:
    np.testing.assert_allclose(
        returns_to_go(np.array([0.0, 1.0, 0.0, -1.0]), np.array([0, 2, 4]), gamma=1.0), [1, 1, -1, -1]
    )


def test_group_advantages_by_hand() -> None:
    scores, groups, kept = np.array([1.0, -0.5, -1.0, 1.0]), np.array([0, 0, 0, 1]), np.ones(4, dtype=bool)
    # mean -1/6; sample variance ((7/6)^2 + (1/3)^2 + (5/6)^2) / 2 = 13/12
    centred = np.array([7 / 6, -1 / 3, -5 / 6, 0.0])
    np.testing.assert_allclose(group_advantages("dr_grpo", scores, groups, kept), centred)
    np.testing.assert_allclose(group_advantages("grpo", scores, groups, kept), centred / np.sqrt(13 / 12), rtol=1e-5)
    np.testing.assert_allclose(group_advantages("rloo", scores, groups, kept), [1.75, -0.5, -1.25, 0.0])


def slow_group_advantage(estimator: str, mine: float, others: list[float]) -> float:
    """By the papers' formulas, one dialogue at a time."""
    if not others:
        return 0.0
    if estimator == "rloo":
        return mine - sum(others) / len(others)
    everyone = [mine, *others]
    mean = sum(everyone) / len(everyone)
    if estimator == "dr_grpo":
        return mine - mean
    return (mine - mean) / ((sum((r - mean) ** 2 for r in everyone) / (len(everyone) - 1)) ** 0.5 + 1e-6)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["grpo", "dr_grpo", "rloo"]))
def test_group_advantages_are_the_slow_loop_over_the_kept_of_each_group(seed: int, estimator: str) -> None:
    random = np.random.default_rng(seed)
    count = int(random.integers(1, 20))
    scores, groups = random.choice([1.0, -0.5, -1.0], count), random.integers(0, 5, count)
    kept = random.random(count) < 0.8
    expected = [
        slow_group_advantage(
            estimator, scores[i], [scores[j] for j in range(count) if j != i and groups[j] == groups[i] and kept[j]]
        )
        if kept[i]
        else 0.0
        for i in range(count)
    ]
    found = group_advantages(estimator, scores, groups, kept)  # type: ignore[arg-type]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_group_that_agrees_teaches_nothing() -> None:
    for estimator in ("grpo", "dr_grpo", "rloo"):
        found = group_advantages(estimator, np.full(4, -0.5), np.zeros(4, dtype=np.int64), np.ones(4, dtype=bool))  # type: ignore[arg-type]
        assert not found.any()
