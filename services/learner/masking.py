"""Leaving dialogues out of an update: what remains is the update of a batch that never had them."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from services.learner.batch import MicroBatch, Plan, Share
from services.learner.ranks import Ranks


def without(work: Plan, kept: NDArray[np.bool_], ranks: Ranks) -> Plan:
    """The plan with no token of the dialogues that are not kept: [D of the whole batch], the same on every rank.

    Their rows stay in the micro-batches, so that ranks keep in step; nothing in them is predicted any more.
    """
    if kept.all():
        return work
    tokens = np.repeat(kept[work.owned], np.diff(work.packed.offsets))
    shares = [_without(share, tokens, (work.counts * kept)[share.members].sum()) for share in work.shares]
    own = [sum(micro.num_actions > 0 for micro in share.micros) for share in shares]
    filled = ranks.sum(np.array(own, dtype=np.float64))  # `loss_mean = "paper"` counts micro-batches
    return replace(work, shares=[replace(share, num_micros=int(n)) for share, n in zip(shares, filled, strict=True)])


def _without(share: Share, tokens: NDArray[np.bool_], num_actions: int) -> Share:
    micros = [_chosen(micro, tokens[micro.flat]) for micro in share.micros]
    return replace(share, micros=micros, num_actions=int(num_actions))


def _chosen(micro: MicroBatch, chosen: NDArray[np.bool_]) -> MicroBatch:
    positions, targets, flat = micro.positions[chosen], micro.targets[chosen], micro.flat[chosen]
    return replace(micro, positions=positions, targets=targets, flat=flat)
