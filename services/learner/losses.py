"""The PPO losses as token sums, and log-probabilities out of hidden states. Pure torch, everything in fp32.

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


def logprobs_from_hidden(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: Tensor,
    temperature: float,
    *,
    max_logits: int = MAX_LOGITS,
    vocab_size: int,
) -> Tensor:
    """The same out of hidden states [A, H], without ever holding more than `max_logits` logits.

    head: hidden [n, H] -> logits [n, V]. In training the logits of each block are computed again for the backward
    pass when there is more than one block. Returns fp32 [A].
    """
    block = max(1, max_logits // vocab_size)
    if len(targets) <= block:
        return logprobs_from_logits(head(hidden), targets, temperature)

    def one(part: Tensor, part_targets: Tensor) -> Tensor:
        return logprobs_from_logits(head(part), part_targets, temperature)

    parts = []
    for part, part_targets in zip(torch.split(hidden, block), torch.split(targets, block), strict=True):
        if torch.is_grad_enabled():
            parts.append(checkpoint(one, part, part_targets, use_reentrant=False))
        else:
            parts.append(one(part, part_targets))
    return torch.cat(parts)


class PolicyLoss(NamedTuple):
    """Sums over action tokens."""

    loss: Tensor  # scalar, carries the gradient
    clipped: Tensor  # scalar: tokens where the clip decides
    kl_old: Tensor  # scalar: k3 estimate of KL(old || new), how far this step has moved


def policy_loss_sum(
    logprobs: Tensor, old: Tensor, behaviour: Tensor, advantages: Tensor, *, clip: float, importance_cap: float
) -> PolicyLoss:
    """-sum w min(r A, clip(r, 1-clip, 1+clip) A), r = pi/pi_old, w = min(pi_old/pi_behaviour, cap). All [A] fp32.

    w corrects for weights (or kernels) other than ours that sampled the token; it carries no gradient.
    """
    log_ratio = logprobs - old
    ratio = log_ratio.exp()
    plain, bounded = ratio * advantages, ratio.clamp(1.0 - clip, 1.0 + clip) * advantages
    loss = -(importance_weights(old, behaviour, importance_cap) * torch.minimum(plain, bounded)).sum()
    with torch.no_grad():
        clipped = (bounded < plain).sum()
        kl_old = (ratio - 1.0 - log_ratio).sum()
    return PolicyLoss(loss, clipped, kl_old)


def importance_weights(old: Tensor, behaviour: Tensor, cap: float) -> Tensor:
    """min(pi_old / pi_behaviour, cap), without gradient: fp32 [A]."""
    return (old - behaviour).detach().exp().clamp(max=cap)


def value_loss_sum(values: Tensor, old: Tensor, returns: Tensor, *, clip: float) -> Tensor:
    """0.5 sum max((V - R)^2, (clip(V, Vold +- clip) - R)^2). All [A] fp32. Scalar."""
    bounded = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (bounded - returns).square()).sum()


def k3_sum(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Sum of exp(-d) - 1 + d with d = logprobs - reference (k3 estimate of the KL), with gradient. Scalar."""
    difference = logprobs - reference
    return ((-difference).exp() - 1.0 + difference).sum()
