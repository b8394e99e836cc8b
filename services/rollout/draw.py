"""How the next token is drawn on a CPU: a group of tokens first, then one of the group; and its log-probability.

vLLM 0.32 makes a random number for every token of the vocabulary (Gumbel-max), which for a small model takes a third of
each step. Two races, over the groups and then within the winner, draw from the same distribution with a number for each
group and each token of one. As in vLLM's, rounding in the last bit of the probabilities changes the winner only where
two are that close: one number over all cumulated probabilities would be cheaper still, and turn on every bit.
"""

from collections.abc import Mapping

import torch

GROUP = 128  # tokens; with 49,152 of them there are 384 groups

# Shapes: B sequences, V tokens of the vocabulary, G groups.


def draw(logits_BV: torch.Tensor, generators: Mapping[int, torch.Generator]) -> tuple[torch.Tensor, torch.Tensor]:
    """A token id for each sequence, and the log-probabilities of all tokens [B, V]. The logits are used up.

    generators: by row. A row's token depends on its logits and its generator; rows without one use torch's own.
    """
    num_rows, num_tokens = logits_BV.shape
    logits_BV.sub_(logits_BV.amax(-1, keepdim=True))
    weights_BV = logits_BV.exp()
    if missing := -num_tokens % GROUP:
        weights_BV = torch.nn.functional.pad(weights_BV, (0, missing))
    weights_BGT = weights_BV.view(num_rows, -1, GROUP)
    groups_BG = weights_BGT.sum(-1)
    num_groups = groups_BG.shape[1]
    waits = torch.empty(num_rows, num_groups + GROUP, dtype=torch.float64)
    if len(generators) < num_rows:
        waits.exponential_()
    for row, generator in generators.items():
        waits[row].exponential_(generator=generator)
    # In a race of exponential waiting times the first to come is i with probability weight_i / sum of weights.
    group_B = (groups_BG / waits[:, :num_groups]).argmax(-1)
    tokens_BT = weights_BGT[torch.arange(num_rows), group_B]
    token_B = group_B * GROUP + (tokens_BT / waits[:, num_groups:]).argmax(-1)
    return token_B, logits_BV.sub_(groups_BG.sum(-1, keepdim=True).log_())
