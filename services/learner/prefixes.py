"""Dialogues that begin alike, as a tree: what they have in common is in a micro-batch once. NumPy only.

A run's dialogues share its system prompt and examples, those of a group their problem too. Under causal attention
whatever a model says of these tokens, and its gradient, depends on nothing behind them: computed once it is the same.
A segment is a stretch of tokens between two branchings; a dialogue is the segments from the root to where it ends.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

MIN_SHARED = 8  # tokens: a segment costs calls of its own in every layer, which fewer are not worth

Ids = NDArray[np.int32] | NDArray[np.int64]


class Tree(NamedTuple):
    """S segments, T tokens. A segment lies behind its parent."""

    input_ids: NDArray[np.int64]  # [T]
    offsets: NDArray[np.int32]  # [S + 1]: where each segment begins, and the end
    parents: NDArray[np.int32]  # [S]: the segment that goes before it; -1: none
    places: list[NDArray[np.int64]]  # per dialogue: where each of its tokens lies


def grow(dialogues: Sequence[Ids]) -> Tree:
    """The tree of these dialogues."""
    order = in_order(dialogues)
    common = [0, *(shared(dialogues[a], dialogues[b]) for a, b in itertools.pairwise(order))]  # with the one before
    segments: list[Ids] = []
    offsets, parents = [0], []
    places = [np.zeros(len(ids), dtype=np.int64) for ids in dialogues]

    def branch(first: int, last: int, depth: int, parent: int) -> None:
        """Dialogues order[first:last], of which the first `depth` tokens are there: `parent` and what is before it."""
        alike = min(common[first + 1 : last], default=len(dialogues[order[first]]))
        if alike - depth >= (MIN_SHARED if last - first > 1 else 1):
            segments.append(dialogues[order[first]][depth:alike])
            offsets.append(offsets[-1] + alike - depth)
            parents.append(parent)
            for i in order[first:last]:
                places[i][depth:alike] = np.arange(offsets[-2], offsets[-1])
            depth, parent = alike, len(segments) - 1
        if last - first > 1:
            cuts = [first, *(i for i in range(first + 1, last) if common[i] == alike), last]
            for begin, end in itertools.pairwise(cuts):
                branch(begin, end, depth, parent)

    branch(0, len(order), 0, -1)
    ids = np.concatenate(segments).astype(np.int64)
    return Tree(ids, np.array(offsets, dtype=np.int32), np.array(parents, dtype=np.int32), places)


def cut(members: NDArray[np.int64], dialogues: Sequence[Ids], micro_tokens: int) -> list[NDArray[np.int64]]:
    """Fill micro-batches with dialogues that begin alike: their tree has up to `micro_tokens` tokens.

    A dialogue longer than `micro_tokens` gets a micro-batch of its own.
    """
    found: list[list[int]] = []
    room = 0
    for place in in_order([dialogues[i] for i in members]):
        i = int(members[place])
        # Fewer than MIN_SHARED of the tokens in common may be in the tree twice.
        new = len(dialogues[i])
        if found and (alike := shared(dialogues[found[-1][-1]], dialogues[i])) >= MIN_SHARED:
            new -= alike - MIN_SHARED + 1
        if not found or new > room:
            found.append([])
            room, new = micro_tokens, len(dialogues[i])
        found[-1].append(i)
        room -= new
    return [np.array(one, dtype=np.int64) for one in found]


def in_order(dialogues: Sequence[Ids]) -> list[int]:
    """Sorted by their tokens: those that begin alike are neighbours."""
    keys = [ids.astype(">i4").tobytes() for ids in dialogues]
    return sorted(range(len(dialogues)), key=keys.__getitem__)


def shared(one: Ids, other: Ids) -> int:
    """How many tokens two dialogues have in common from the beginning."""
    length = min(len(one), len(other))
    differing: NDArray[Any] = np.flatnonzero(one[:length] != other[:length])
    return int(differing[0]) if len(differing) else length
