"""The losses as token sums, and log-probabilities out of hidden states. Pure torch, everything in fp32.

Sums, not means: the caller multiplies each by the share its mean needs, so that a minibatch cut in any way into
micro-batches and ranks has the same loss and the same gradients. A = number of action tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 1 << 27  # elements of one block of logits: 0.5 GiB in fp32


def logprobs_from_logits(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature)[target]. logits [A, V] any float dtype; targets [A] int64. Returns fp32 [A]."""
    return -functional.cross_entropy(logits.float() / temperature, targets, reduction="none")


def logprobs_and_entropy(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """The same, and the entropy of the whole distribution, nats: fp32 [2, A], both with gradient."""
    every = torch.log_softmax(logits.float() / temperature, dim=-1)
    chosen = every.gather(-1, targets[:, None]).squeeze(-1)
    return torch.stack([chosen, -(every.exp() * every).sum(-1)])


def logprobs_from_hidden(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: Tensor,
    temperature: float,
    *,
    max_logits: int = MAX_LOGITS,
    vocab_size: int,
    with_entropy: bool = False,
) -> Tensor:
    """The same out of hidden states [A, H], without ever holding more than `max_logits` logits.

    head: hidden [n, H] -> logits [n, V]. In training the logits of each block are computed again for the backward
    pass when there is more than one block. Returns fp32 [A], or [2, A] with the entropies.
    """
    block = max(1, max_logits // vocab_size)
    out_of_logits = logprobs_and_entropy if with_entropy else logprobs_from_logits
    if len(targets) <= block:
        return out_of_logits(head(hidden), targets, temperature)

    def one(part: Tensor, part_targets: Tensor) -> Tensor:
        return out_of_logits(head(part), part_targets, temperature)

    parts = []
    for part, part_targets in zip(torch.split(hidden, block), torch.split(targets, block), strict=True):
        if torch.is_grad_enabled():
            parts.append(checkpoint(one, part, part_targets, use_reentrant=False))
        else:
            parts.append(one(part, part_targets))
    return torch.cat(parts, dim=-1)


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
