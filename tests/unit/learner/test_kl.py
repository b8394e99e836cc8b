import math

import numpy as np
import pytest
import torch

from services.learner.kl import adapted, kl


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def test_estimators_by_hand() -> None:
    new, reference = tensor(-1.0, -2.0, -3.0), tensor(-2.0, -2.0, -1.0)  # d = 1, 0, -2
    np.testing.assert_allclose(kl(new, reference, "k1"), [1, 0, -2])
    np.testing.assert_allclose(kl(new, reference, "k2"), [0.5, 0, 2])
    np.testing.assert_allclose(kl(new, reference, "k3"), [math.exp(-1), 0, math.exp(2) - 3], rtol=1e-6)


def test_gradients_by_hand() -> None:
    for estimator, expected in (("k1", [1.0, 1.0]), ("k2", [1.0, -2.0]), ("k3", [1 - math.exp(-1), 1 - math.exp(2)])):
        new = tensor(-1.0, -3.0).requires_grad_()
        kl(new, tensor(-2.0, -1.0), estimator).sum().backward()  # type: ignore[arg-type]
        np.testing.assert_allclose(new.grad, expected, rtol=1e-6)


def test_over_the_whole_distribution_k1_and_k3_are_the_kl_and_k2_has_its_gradient() -> None:
    logits = torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    reference = torch.log_softmax(torch.randn(9, generator=torch.Generator().manual_seed(1)).double(), 0)
    logprobs = torch.log_softmax(logits, 0)
    exact = (logprobs.exp() * (logprobs - reference)).sum()
    for estimator in ("k1", "k3"):
        mean = (logprobs.exp() * kl(logprobs, reference, estimator)).sum()  # type: ignore[arg-type]
        assert float(mean.detach()) == pytest.approx(float(exact.detach()), abs=1e-12)
    (wanted,) = torch.autograd.grad(exact, logits, retain_graph=True)
    (found,) = torch.autograd.grad((logprobs.exp().detach() * kl(logprobs, reference, "k2")).sum(), logits)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("measured", "factor"), [(0.1, 1.0), (0.11, 1.01), (9.0, 1.02), (0.0, 0.98), (0.09, 0.99)])
def test_the_coefficient_follows_the_target(measured: float, factor: float) -> None:
    assert adapted(0.05, measured=measured, target=0.1) == pytest.approx(0.05 * factor)
