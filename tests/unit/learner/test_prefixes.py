"""Dialogues as a tree of segments: nothing is lost, little is there twice."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from services.learner.prefixes import MIN_SHARED, cut, grow

Ids = NDArray[np.int32]


def ids(*tokens: int) -> Ids:
    return np.array(tokens, dtype=np.int32)


def read(tokens: NDArray[np.int64], offsets: NDArray[np.int32], parents: NDArray[np.int32], segment: int) -> list[int]:
    """Tokens from the root to the end of a segment."""
    own: list[int] = tokens[offsets[segment] : offsets[segment + 1]].tolist()
    parent = int(parents[segment])
    return own if parent < 0 else read(tokens, offsets, parents, parent) + own


def dialogues() -> st.SearchStrategy[list[Ids]]:
    """Of few different tokens and made of a few pieces, so that many begin alike."""
    piece = st.sampled_from([[0] * MIN_SHARED, [1] * (MIN_SHARED - 1), [2], [3] * (2 * MIN_SHARED)])
    one = st.lists(piece, min_size=1, max_size=5).map(lambda pieces: ids(*(token for part in pieces for token in part)))
    return st.lists(one, min_size=1, max_size=12)


@given(dialogues())
def test_every_dialogue_is_the_tokens_from_the_root_to_where_it_ends(found: list[Ids]) -> None:
    tree = grow(found)
    assert all(-1 <= parent < place for place, parent in enumerate(tree.parents.tolist()))
    assert np.all(np.diff(tree.offsets) > 0) and tree.offsets[-1] == len(tree.input_ids)
    for one, places in zip(found, tree.places, strict=True):
        assert tree.input_ids[places].tolist() == one.tolist()
        end = int(np.searchsorted(tree.offsets, places[-1], side="right")) - 1
        assert read(tree.input_ids, tree.offsets, tree.parents, end)[: len(one)] == one.tolist()
        assert places[-1] == tree.offsets[end + 1] - 1  # dialogues end where segments do


def test_prompt_and_examples_are_there_once() -> None:
    system, problems = range(100, 120), [range(20), range(30, 50)]
    found = [ids(*system, *problem, 60 + answer, 9) for problem in problems for answer in (1, 2, 3)]
    tree = grow(found)
    assert len(tree.input_ids) == 20 + 2 * 20 + 6 * 2
    assert tree.parents.tolist() == [-1, 0, 1, 1, 1, 0, 5, 5, 5]


def test_the_same_dialogue_twice_takes_no_more_room() -> None:
    assert len(grow([ids(*range(30))] * 3).input_ids) == 30


def test_a_short_beginning_is_not_worth_sharing() -> None:
    few = range(MIN_SHARED - 1)
    assert len(grow([ids(*few, 50), ids(*few, 51)]).parents) == 2


@given(dialogues(), st.integers(1, 100))
def test_trees_hold_every_dialogue_once_within_their_tokens(found: list[Ids], micro_tokens: int) -> None:
    members = np.arange(len(found))[::-1]
    cuts = cut(members, found, micro_tokens)
    assert sorted(i for one in cuts for i in one.tolist()) == sorted(members.tolist())
    for one in cuts:
        assert len(one) == 1 or len(grow([found[i] for i in one]).input_ids) <= micro_tokens


@pytest.mark.parametrize("size", [50, 400])
def test_dialogues_that_begin_alike_are_in_the_same_micro_batch(size: int) -> None:
    found = [ids(*[problem] * 30, 10 + answer, 3) for answer in range(4) for problem in range(8)]
    cuts = cut(np.arange(len(found)), found, size)
    problems = [{int(found[i][0]) for i in one} for one in cuts]
    assert sum(map(len, problems)) <= 8 + len(cuts) - 1  # each cut parts one problem's dialogues at most
