"""How far the policy is from its reference, per token, and the coefficient that holds it there. Pure torch.

d = log pi(token) - log pi_ref(token), tokens sampled from pi. Schulman 2020, "Approximating KL divergence"
(joschu.net/blog/kl-approx.html): k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d. k1 and k3 estimate KL(pi || pi_ref)
without bias, k3 is never negative and varies less.
"""

from typing import Literal

from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]

ADAPT_RATE = 0.1
ADAPT_LIMIT = 0.2


def kl(logprobs: Tensor, reference: Tensor, estimator: Estimator = "k3") -> Tensor:
    """The estimate at each token: both [A] fp32 -> [A], with the gradient of `logprobs`.

    As a loss only k2 has the gradient of KL(pi || pi_ref) on average; k3's is that of KL(pi_ref || pi), and k1's
    averages to nothing (Tang, Munos 2025, arXiv 2506.09477). As a reward k1's policy gradient is the right one.
    """
    difference = logprobs - reference
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    return (-difference).exp() - 1.0 + difference


def adapted(coefficient: float, *, measured: float, target: float) -> float:
    """The coefficient after an update in which `measured` nats per token were seen (Ziegler et al. 2019, section 2.2).

    It grows by at most 2 % while the KL is above its target, and shrinks so below it: arXiv 1909.08593 gives
    beta (1 + 0.1 clip(measured / target - 1, -0.2, 0.2)).
    """
    error = min(max(measured / target - 1.0, -ADAPT_LIMIT), ADAPT_LIMIT)
    return coefficient * (1.0 + ADAPT_RATE * error)
