import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.learner.losses import (
    importance_weights,
    k3_sum,
    logprobs_from_hidden,
    logprobs_from_logits,
    policy_loss_sum,
    value_loss_sum,
)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def test_policy_loss_by_hand() -> None:
    # ratios 1.5 and 0.5; A = 1 is clipped to 1.2, A = -1 to 0.8; weights 1 and min(e, 2) = 2.
    old = tensor(-1.0, -1.0)
    new = old + tensor(math.log(1.5), math.log(0.5))
    result = policy_loss_sum(new, old, tensor(-1.0, -2.0), tensor(1.0, -1.0), clip=0.2, importance_cap=2.0)
    assert float(result.loss) == pytest.approx(-(1 * 1.2 + 2 * -0.8))
    assert int(result.clipped) == 2


def test_unclipped_policy_gradient_at_the_old_policy_is_minus_the_weighted_advantage() -> None:
    new = tensor(-1.0, -2.0).requires_grad_()
    result = policy_loss_sum(new, new.detach(), tensor(-1.5, -2.0), tensor(0.5, -2.0), clip=0.2, importance_cap=10.0)
    result.loss.backward()
    np.testing.assert_allclose(new.grad, [-0.5 * math.exp(0.5), 2.0], rtol=1e-6)


def test_value_loss_by_hand() -> None:
    # V 1.0, old 0.5: clipped to 0.7; R 0: max(1, 0.49). V 0.6, old 0.5, R 1: 0.16 both.
    loss = value_loss_sum(tensor(1.0, 0.6), tensor(0.5, 0.5), tensor(0.0, 1.0), clip=0.2)
    assert float(loss) == pytest.approx(0.5 * (1.0 + 0.16))


def test_k3_by_hand_and_its_gradient() -> None:
    new = tensor(-1.0, -2.0).requires_grad_()
    loss = k3_sum(new, tensor(-2.0, -2.0))
    loss.backward()
    assert loss.item() == pytest.approx(math.exp(-1) - 1 + 1)
    np.testing.assert_allclose(new.grad, [1 - math.exp(-1), 0.0], rtol=1e-6)


def test_importance_weights_are_truncated_and_carry_no_gradient() -> None:
    old = tensor(-1.0, -1.0).requires_grad_()
    weights = importance_weights(old, tensor(-1.5, -9.0), 2.0)
    np.testing.assert_allclose(weights, [math.exp(0.5), 2.0], rtol=1e-6)
    assert not weights.requires_grad


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.4), st.floats(0.5, 4.0))
def test_losses_agree_with_numpy(seed: int, clip: float, cap: float) -> None:
    random = np.random.default_rng(seed)
    new, old, behaviour, advantage, returns = (random.normal(-1, 0.7, 20).astype(np.float32) for _ in range(5))
    ratio = np.exp(new.astype(np.float64) - old)
    weight = np.minimum(np.exp(old.astype(np.float64) - behaviour), cap)
    expected = -(weight * np.minimum(ratio * advantage, np.clip(ratio, 1 - clip, 1 + clip) * advantage)).sum()
    tensors = [torch.from_numpy(x) for x in (new, old, behaviour, advantage)]
    ours = policy_loss_sum(*tensors, clip=clip, importance_cap=cap)
    assert float(ours.loss) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    bounded = np.clip(new, old - clip, old + clip)
    expected = 0.5 * np.maximum((new - returns) ** 2, (bounded - returns) ** 2).sum()
    loss = value_loss_sum(tensors[0], tensors[1], torch.from_numpy(returns), clip=clip)
    assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_logprobs_are_those_of_the_tempered_softmax() -> None:
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 3, 6, 2])
    expected = torch.log_softmax(logits.double() / 0.7, dim=-1)[torch.arange(4), targets]
    torch.testing.assert_close(logprobs_from_logits(logits, targets, 0.7).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("max_logits", [7, 21, 10_000])
def test_blocks_of_logits_change_neither_values_nor_gradients(max_logits: int) -> None:
    random = torch.Generator().manual_seed(1)
    head = torch.nn.Linear(5, 7)
    hidden = torch.randn(10, 5, generator=random).requires_grad_()
    targets = torch.randint(0, 7, (10,), generator=random)
    whole = logprobs_from_logits(head(hidden), targets, 1.0)
    expected = torch.autograd.grad(whole.square().sum(), [hidden, head.weight])
    blocks = logprobs_from_hidden(hidden, head, targets, 1.0, max_logits=max_logits, vocab_size=7)
    torch.testing.assert_close(blocks, whole)
    torch.testing.assert_close(torch.autograd.grad(blocks.square().sum(), [hidden, head.weight]), expected)


def test_no_action_is_no_loss_and_a_zero_gradient() -> None:
    head = torch.nn.Linear(5, 7)
    nothing = torch.zeros(0)
    logprobs = logprobs_from_hidden(torch.zeros(0, 5), head, torch.zeros(0, dtype=torch.int64), 1.0, vocab_size=7)
    loss = policy_loss_sum(logprobs, nothing, nothing, nothing, clip=0.2, importance_cap=2.0).loss
    loss.backward()
    assert loss.item() == 0.0 and head.weight.grad is not None and not head.weight.grad.any()
