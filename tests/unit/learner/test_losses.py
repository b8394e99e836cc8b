import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from services.learner.losses import (
    importance_weights,
    policy_loss_sum,
    value_loss_sum,
)
from services.learner.token_head import TokenHead


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


ONE = tensor(1.0, 1.0)


def test_policy_loss_by_hand() -> None:
    # ratios 1.5 and 0.5; A = 1 is clipped to 1.2, A = -1 to 0.8; weights 1 and min(e, 2) = 2.
    old = tensor(-1.0, -1.0)
    new = old + tensor(math.log(1.5), math.log(0.5))
    weights = importance_weights(old, tensor(-1.0, -2.0), 2.0)
    result = policy_loss_sum(new, old, weights, tensor(1.0, -1.0), clip_low=0.2, clip_high=0.2)
    assert float(result.loss) == pytest.approx(-(1 * 1.2 + 2 * -0.8))
    assert (int(result.clipped_low), int(result.clipped_high), int(result.dual_clipped)) == (1, 1, 0)


def test_the_clip_is_wider_above_when_told_so() -> None:
    old = tensor(-1.0, -1.0)
    new = old + tensor(math.log(1.25), math.log(0.75))
    narrow = policy_loss_sum(new, old, ONE, tensor(1.0, -1.0), clip_low=0.2, clip_high=0.2)
    wide = policy_loss_sum(new, old, ONE, tensor(1.0, -1.0), clip_low=0.2, clip_high=0.28)
    assert float(narrow.loss) == pytest.approx(-(1.2 - 0.8))
    assert float(wide.loss) == pytest.approx(-(1.25 - 0.8))
    assert (int(wide.clipped_low), int(wide.clipped_high)) == (1, 0)


def test_dual_clip_by_hand() -> None:
    # r = 5, A = -2: -10, but no less than 3 x -2. r = 5, A = 2: the ordinary clip, 1.2 x 2. No gradient in either.
    old = tensor(-3.0, -3.0)
    new = (old + math.log(5.0)).requires_grad_()
    result = policy_loss_sum(new, old, ONE, tensor(-2.0, 2.0), clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(6.0 - 2.4)
    assert int(result.dual_clipped) == 1 and not new.grad.any()
    without = policy_loss_sum(new.detach(), old, ONE, tensor(-2.0, 2.0), clip_low=0.2, clip_high=0.2)
    assert float(without.loss) == pytest.approx(10.0 - 2.4)


def test_unclipped_policy_gradient_at_the_old_policy_is_minus_the_weighted_advantage() -> None:
    new = tensor(-1.0, -2.0).requires_grad_()
    weights = importance_weights(new, tensor(-1.5, -2.0), 10.0)
    result = policy_loss_sum(new, new.detach(), weights, tensor(0.5, -2.0), clip_low=0.2, clip_high=0.2)
    result.loss.backward()
    np.testing.assert_allclose(new.grad, [-0.5 * math.exp(0.5), 2.0], rtol=1e-6)


def test_value_loss_by_hand() -> None:
    # V 1.0, old 0.5: clipped to 0.7; R 0: max(1, 0.49). V 0.6, old 0.5, R 1: 0.16 both. V 1, old 0, R 1: 0.8^2.
    result = value_loss_sum(tensor(1.0, 0.6, 1.0), tensor(0.5, 0.5, 0.0), tensor(0.0, 1.0, 1.0), clip=0.2)
    assert float(result.loss) == pytest.approx(0.5 * (1.0 + 0.16 + 0.64))
    assert int(result.clipped) == 1


def test_importance_weights_are_truncated_and_carry_no_gradient() -> None:
    old = tensor(-1.0, -1.0).requires_grad_()
    weights = importance_weights(old, tensor(-1.5, -9.0), 2.0)
    np.testing.assert_allclose(weights, [math.exp(0.5), 2.0], rtol=1e-6)
    assert not weights.requires_grad


def slow_policy_loss(
    mask: NDArray[np.bool_], arrays: list[NDArray[np.float64]], bounds: tuple[float, float, float, float]
) -> float:
    """Mean over the masked tokens of a padded block, one token at a time, from the papers' formulas."""
    low, high, dual, cap = bounds
    total, count = 0.0, 0
    for row, column in np.ndindex(mask.shape):
        if not mask[row, column]:
            continue
        new, old, behaviour, advantage = (float(array[row, column]) for array in arrays)
        ratio = math.exp(new - old)
        objective = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
        if dual and advantage < 0:
            objective = max(objective, dual * advantage)
        total -= min(math.exp(old - behaviour), cap) * objective
        count += 1
    return total / count


def slow_value_loss(mask: NDArray[np.bool_], arrays: list[NDArray[np.float64]], clip: float) -> float:
    total = 0.0
    for row, column in np.ndindex(mask.shape):
        if mask[row, column]:
            value, old, target = (float(array[row, column]) for array in arrays)
            near = min(max(value, old - clip), old + clip)
            total += 0.5 * max((value - target) ** 2, (near - target) ** 2)
    return total / mask.sum()


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.floats(0.05, 0.4),
    st.floats(0.05, 0.6),
    st.sampled_from([0.0, 1.5, 3.0]),
    st.floats(0.5, 4.0),
)
def test_token_means_equal_numpy_on_random_masks(seed: int, low: float, high: float, dual: float, cap: float) -> None:
    random = np.random.default_rng(seed)
    mask = random.random((4, 15)) < random.uniform(0.1, 1.0)
    mask[0, 0] = True
    blocks = [random.normal(-1, 0.5, mask.shape).astype(np.float32) for _ in range(4)]
    wide = [block.astype(np.float64) for block in blocks]
    new, old, behaviour, advantage = (torch.from_numpy(block[mask]) for block in blocks)
    weights = importance_weights(old, behaviour, cap)
    ours = policy_loss_sum(new, old, weights, advantage, clip_low=low, clip_high=high, dual_clip=dual)
    assert float(ours.loss / mask.sum()) == pytest.approx(
        slow_policy_loss(mask, wide, (low, high, dual, cap)), abs=1e-6
    )
    value = value_loss_sum(new, old, behaviour, clip=low).loss / mask.sum()
    assert float(value) == pytest.approx(slow_value_loss(mask, wide[:3], low), abs=1e-6)


def test_no_action_is_no_loss_and_a_zero_gradient() -> None:
    head, nothing = TokenHead(5, 7), torch.zeros(0)
    logprobs = head(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64))
    loss = policy_loss_sum(logprobs, nothing, nothing, nothing, clip_low=0.2, clip_high=0.2).loss
    loss.backward()
    assert loss.item() == 0.0 and head.weight.grad is not None and not head.weight.grad.any()
