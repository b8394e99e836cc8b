"""A version's fingerprint: the same however its bytes are cut, another for any byte that is elsewhere or different."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.contracts.weights.fingerprint import BLOCK_BYTES, fingerprint, share

SIZE = 2 * BLOCK_BYTES + 1000


def run_of_bytes(seed: int = 0, size: int = SIZE) -> torch.Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def whole(data: torch.Tensor) -> str:
    return fingerprint([int(share(data, 0))])


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, SIZE // 8), max_size=6))
def test_pieces_add_up_to_the_whole(cuts):
    data = run_of_bytes()
    edges = sorted({0, SIZE, *(8 * cut for cut in cuts)})
    parts = [int(share(data[a:b], a)) for a, b in pairwise(edges)]
    assert fingerprint(parts) == whole(data)


@pytest.mark.parametrize("at", [0, 7, 4096, BLOCK_BYTES, SIZE - 1])
def test_a_flipped_bit_changes_it(at):
    data = run_of_bytes()
    changed = data.clone()
    changed[at] ^= 128
    assert whole(changed) != whole(data)


def test_two_blocks_or_two_words_in_each_others_place_change_it():
    data = run_of_bytes()
    blocks = torch.cat([data[BLOCK_BYTES : 2 * BLOCK_BYTES], data[:BLOCK_BYTES], data[2 * BLOCK_BYTES :]])
    words = torch.cat([data[8:16], data[:8], data[16:]])
    assert len({whole(data), whole(blocks), whole(words)}) == 3


def test_it_is_the_number_that_it_was():
    """Learner and replicas may be of different builds."""
    data = (torch.arange(SIZE) % 251).to(torch.uint8)
    assert whole(data) == "dbe7ed0c8f445ab7"


def test_zeros_after_the_end_change_nothing():
    data = run_of_bytes()
    assert whole(torch.cat([data, torch.zeros(64, dtype=torch.uint8)])) == whole(data)
