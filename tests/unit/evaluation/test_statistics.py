"""Each estimator against a slow one that does what its definition says."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.evaluation.statistics import (
    NOTHING,
    at_cost,
    estimate,
    pass_at_k,
    ratio,
    resample,
    sign_flip_p,
    stratified_sign_flip_p,
    tokens_until_solved,
)

samples = st.lists(st.tuples(st.booleans(), st.integers(1, 50)), min_size=1, max_size=6)
fractions = st.lists(st.builds(Fraction, st.integers(-3, 3), st.sampled_from([1, 2, 3])), max_size=8)


@given(samples, st.data())
def test_pass_at_k_is_the_share_of_all_subsets_with_a_correct_one(drawn, data):
    k = data.draw(st.integers(1, len(drawn)))
    correct = [is_correct for is_correct, _ in drawn]
    subsets = [any(subset) for subset in itertools.combinations(correct, k)]
    assert pass_at_k(len(correct), sum(correct), k) == pytest.approx(sum(subsets) / len(subsets))


@given(samples, st.data())
@settings(max_examples=50)
def test_tokens_until_solved_is_the_mean_over_all_orders(drawn, data):
    k = data.draw(st.integers(1, len(drawn)))
    costs = []
    for order in itertools.permutations(drawn):
        cost = 0
        for is_correct, tokens in order[:k]:
            cost += tokens
            if is_correct:
                break
        costs.append(cost)
    found = tokens_until_solved([c for c, _ in drawn], [t for _, t in drawn], k)
    assert found == pytest.approx(sum(costs) / len(costs))


@pytest.mark.parametrize("k", [0, 4])
def test_more_samples_than_there_are_cannot_be_drawn(k):
    with pytest.raises(ValueError, match=f"k = {k} samples cannot be drawn of 3"):
        pass_at_k(3, 1, k)
    with pytest.raises(ValueError, match=f"k = {k} samples cannot be drawn of 3"):
        tokens_until_solved([True, False, False], [1, 1, 1], k)


@given(fractions)
def test_sign_flip_p_is_the_share_of_all_sign_patterns_as_far_from_zero(differences):
    observed = abs(sum(differences))
    patterns = list(itertools.product((-1, 1), repeat=len(differences)))
    sums = [abs(sum(sign * d for sign, d in zip(signs, differences, strict=True))) for signs in patterns]
    assert sign_flip_p(differences) == pytest.approx(sum(total >= observed for total in sums) / len(sums))


def test_sign_flip_p_of_wins_and_losses_is_the_exact_sign_test():
    expected = 2 * sum(math.comb(12, i) for i in range(3)) / 2**12
    assert sign_flip_p([Fraction(1)] * 10 + [Fraction(-1)] * 2 + [Fraction(0)] * 300) == pytest.approx(expected)


def test_stratified_p_is_near_the_exact_one_and_never_zero():
    groups = [np.array([1.0, 1.0, 0.0, -1.0]), np.array([1.0, 1.0, 1.0, 0.5, 0.5])]
    observed = abs(sum(group.mean() for group in groups))
    sums = [
        abs(sum(np.dot(signs[a:b], group) / len(group) for group, a, b in ((groups[0], 0, 4), (groups[1], 4, 9))))
        for signs in itertools.product((-1, 1), repeat=9)
    ]
    exact = np.mean([total >= observed - 1e-9 for total in sums])
    assert stratified_sign_flip_p(groups, seed=1) == pytest.approx(exact, abs=0.02)
    assert 0 < stratified_sign_flip_p([np.ones(100)], seed=1) < 0.001


def test_resampled_means_are_distributed_as_all_draws_with_replacement_are():
    figures = np.array([[0.0, 1.0], [1.0, 1.0], [4.0, 1.0]])
    rows = resample(figures, seed=3)
    assert rows[0].tolist() == [5 / 3, 1.0] and (rows[:, 1] == 1.0).all()
    draws = [round(sum(draw) / 3, 9) for draw in itertools.product((0.0, 1.0, 4.0), repeat=3)]
    for mean in set(draws):
        share = np.mean(np.isclose(rows[1:, 0], mean))
        assert share == pytest.approx(draws.count(mean) / len(draws), abs=0.02)


def test_figures_of_one_problem_are_resampled_together():
    figures = np.random.default_rng(0).integers(2, size=(40, 1)).astype(float)
    rows = resample(np.hstack([figures, 1 - figures]), seed=1, resamples=500)
    assert np.allclose(rows.sum(axis=1), 1.0)


def test_an_interval_has_its_level():
    """Of 400 experiments with a true mean of 0.3, about 95 % have it in their interval."""
    rng = np.random.default_rng(5)
    inside = 0
    for seed in range(400):
        found = estimate(resample((rng.random((80, 1)) < 0.3).astype(float), seed=seed, resamples=400)[:, 0])
        inside += found.low <= 0.3 <= found.high
    assert 0.91 <= inside / 400 <= 0.985


def test_a_ratio_without_anything_below_it_is_nothing():
    rows = ratio(np.array([0.0, 1.0, 1.0]), np.array([0.0, 2.0, 0.0]))
    assert estimate(rows) == NOTHING
    assert estimate(ratio(np.array([1.0, 1.0, 1.0]), np.array([2.0, 4.0, 0.0]))).value == 0.5


def test_the_cost_of_dialogues_is_looked_up_between_numbers_of_samples():
    accuracies, costs = np.array([[0.5, 0.7]] * 4), np.array([[10.0, 16.0]] * 4)
    found = at_cost(accuracies, costs, np.array([5.0, 10.0, 13.0, 17.0]))
    assert found[:3].tolist() == pytest.approx([0.25, 0.5, 0.6]) and np.isnan(found[3])
