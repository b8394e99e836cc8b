"""The losses as token sums. Pure torch, everything in fp32.

Sums, not means: the caller multiplies each by the share its mean needs, so that a minibatch cut in any way into
micro-batches and ranks has the same loss and the same gradients. A = number of action tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class PolicyLoss(NamedTuple):
    """Sums over action tokens, scalars; only `loss` carries a gradient."""

    loss: Tensor
    clipped_low: Tensor  # tokens whose ratio fell out of the clip from below while A < 0: no gradient
    clipped_high: Tensor  # the same from above while A > 0
    dual_clipped: Tensor  # tokens that the dual clip decides: no gradient
    kl_old: Tensor  # k3 estimate of KL(old || new), how far this step has moved


def policy_loss_sum(
    logprobs: Tensor,
    old: Tensor,
    weights: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float = 0.0,
) -> PolicyLoss:
    """-sum w min(r A, clip(r, 1 - low, 1 + high) A), r = pi/pi_old (Schulman et al. 2017, arXiv 1707.06347, eq. 7).

    low and high may differ (DAPO, arXiv 2503.14476, eq. 10). dual_clip c > 1: where A < 0 the objective is no less
    than c A (Ye et al. 2020, arXiv 1912.09729, eq. 5), so that a huge ratio cannot dominate; 0: without. All tensors
    [A] fp32. w: `importance_weights`.
    """
    log_ratio = logprobs - old
    ratio = log_ratio.exp()
    plain, bounded = ratio * advantages, ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    objective = torch.minimum(plain, bounded)
    is_dual = torch.zeros_like(objective, dtype=torch.bool)
    if dual_clip:
        floor = dual_clip * advantages
        is_dual = (advantages < 0) & (objective < floor)
        objective = torch.where(is_dual, floor, objective)
    with torch.no_grad():
        decides = bounded < plain
        counts = ((decides & (advantages < 0)).sum(), (decides & (advantages > 0)).sum(), is_dual.sum())
        kl_old = (ratio - 1.0 - log_ratio).sum()
    return PolicyLoss(-(weights * objective).sum(), *counts, kl_old)


def importance_weights(old: Tensor, behaviour: Tensor, cap: float) -> Tensor:
    """min(pi_old / pi_behaviour, cap), without gradient: fp32 [A].

    Corrects for weights (or kernels) other than ours that sampled the token (Espeholt et al. 2018, arXiv 1802.01561).
    """
    return (old - behaviour).detach().exp().clamp(max=cap)


class ValueLoss(NamedTuple):
    """Sums over action tokens, scalars; only `loss` carries a gradient."""

    loss: Tensor
    clipped: Tensor  # tokens where the clip decides


def value_loss_sum(values: Tensor, old: Tensor, returns: Tensor, *, clip: float) -> ValueLoss:
    """0.5 sum max((V - R)^2, (clip(V, Vold +- clip) - R)^2) (paper.md section 2). All [A] fp32."""
    bounded = old + (values - old).clamp(-clip, clip)
    plain, kept = (values - returns).square(), (bounded - returns).square()
    is_far = (values - old).abs() > clip  # else the two differ by rounding alone
    return ValueLoss(0.5 * torch.maximum(plain, kept).sum(), (is_far & (kept > plain)).sum())
