"""Fingerprints of packed weights: 64 bits, the same on any device and however the run of bytes is cut.

Each byte's share depends on where it lies, and shares add up (mod 2**64): the sum over a version's buckets is its
fingerprint, and so is the sum over its tensors. A column of a block is added up first and then multiplied with an odd
factor of its own, so one pass of additions at the speed of memory does it, on a GPU as on a CPU. It guards against
lost, stale or mixed-up bytes, not against an adversary.
"""

import numpy as np
import torch

COLUMNS = 1024  # of eight bytes
ROWS = 128
BLOCK_BYTES = ROWS * COLUMNS * 8
FACTOR = -7046029254386353131  # 2**64 divided by the golden ratio, as a signed number; odd


def share(data: torch.Tensor, start: int) -> torch.Tensor:
    """What `data` (uint8, contiguous), bytes `start` and up of a run, adds to its fingerprint.

    start: a multiple of 8. A 0-d int64 tensor on the data's device; nothing waits for it. Zeros add nothing.
    """
    assert start % 8 == 0, f"bytes from {start} do not begin with a word"
    lead = start % BLOCK_BYTES
    whole = 0 if lead else data.numel() // BLOCK_BYTES * BLOCK_BYTES
    total = _blocks(data[:whole], start // BLOCK_BYTES)
    if whole < data.numel():
        rest = data[whole:]
        size = -(-(lead + rest.numel()) // BLOCK_BYTES) * BLOCK_BYTES
        padded = torch.zeros(size, dtype=torch.uint8, device=data.device)
        padded[lead : lead + rest.numel()] = rest
        total = total + _blocks(padded, (start + whole) // BLOCK_BYTES)
    return total


def fingerprint(shares: list[int]) -> str:
    """The fingerprint that these shares add up to, 16 hexadecimal digits."""
    return f"{sum(shares) % 2**64:016x}"


def _blocks(data: torch.Tensor, first: int) -> torch.Tensor:
    """The share of whole blocks, numbered from `first`."""
    if data.device.type == "cpu":  # numpy: on one thread, where torch's would fight with those of generation
        summed = torch.from_numpy(data.numpy().view(np.int64).reshape(-1, ROWS, COLUMNS).sum(1)).flatten()
    else:
        summed = data.view(torch.int64).view(-1, ROWS, COLUMNS).sum(1).flatten()
    places = torch.arange(first * COLUMNS, first * COLUMNS + summed.numel(), device=data.device)
    return (summed * ((2 * places + 1) * FACTOR)).sum()
