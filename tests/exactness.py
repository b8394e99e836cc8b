"""How far the log-probabilities that were sampled with are from those of the same weights in plain transformers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from services.contracts.wire import Trajectory


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of two sets of log-probabilities of the same sampled tokens."""

    num_tokens: int
    mean: float
    """Mean absolute difference."""
    worst: float
    """Largest absolute difference."""
    kl: float
    """k3 estimate of KL(behaviour || recomputed), mean per token."""
    effective_share: float
    """Effective sample size of the dialogues' importance weights, as a share of their number."""


@torch.no_grad()
def recompute(
    model: Any, trajectory: Trajectory, *, temperature: float = 1.0, fp32_head: bool = False
) -> NDArray[np.float32]:
    """Log-probability of each sampled token given those before it, from one forward pass of a transformers model; [n].

    fp32_head: the output head in fp32, whatever the model's dtype.
    """
    token_ids = torch.tensor(trajectory.token_ids.astype(np.int64))
    positions = torch.tensor(np.flatnonzero(trajectory.action_mask))
    hidden = model.model(token_ids[None]).last_hidden_state[0, positions - 1]
    weight = model.lm_head.weight
    logits = hidden.float() @ weight.float().T if fp32_head else hidden @ weight.T
    logprobs = (logits.float() / temperature).log_softmax(-1)
    return logprobs.gather(1, token_ids[positions, None])[:, 0].numpy()


def agreement(behaviour: Sequence[NDArray[np.float32]], recomputed: Sequence[NDArray[np.float32]]) -> Agreement:
    """Both: one array for each dialogue, of its sampled tokens alone."""
    ratios = [(after - before).astype(np.float64) for before, after in zip(behaviour, recomputed, strict=True)]
    log_ratio = np.concatenate(ratios)
    weights = np.exp([ratio.sum() for ratio in ratios])
    return Agreement(
        num_tokens=len(log_ratio),
        mean=float(np.abs(log_ratio).mean()),
        worst=float(np.abs(log_ratio).max()),
        kl=float((np.expm1(log_ratio) - log_ratio).mean()),
        effective_share=float(weights.sum() ** 2 / (len(weights) * (weights**2).sum())),
    )


def share_identical(left: Mapping[int, Trajectory], right: Mapping[int, Trajectory]) -> float:
    """Share of the tasks whose dialogue is the same, token for token."""
    return float(np.mean([np.array_equal(left[i].token_ids, right[i].token_ids) for i in left]))
