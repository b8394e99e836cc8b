"""How named tensors become one flat run of bytes, and where it is cut into buckets. Pure.

Both sides compute the same plan from the same specs, so only bytes travel. Buckets are slices of the run and know
nothing of tensors: a large embedding spans several, small biases share one.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

ALIGNMENT_BYTES = 64  # each tensor starts on a cache line, so a view of any dtype is legal

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor as it travels: its Hugging Face name, dtype name (`bfloat16`) and full shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size without padding. Raises ValueError for a dtype that does not travel."""
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"{self.name}: dtype {self.dtype} cannot be transferred, only {', '.join(ITEM_BYTES)}")
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Plan:
    """Where each tensor lies in the run: `offsets[i]` bytes for `specs[i]`."""

    specs: tuple[TensorSpec, ...]
    offsets: tuple[int, ...]
    num_bytes: int  # of the whole run, padding included
    bucket_bytes: int

    def buckets(self) -> Iterator[tuple[int, int]]:
        """(start, end) of each bucket, in sending order; together they cover the run exactly once."""
        for start in range(0, self.num_bytes, self.bucket_bytes):
            yield start, min(start + self.bucket_bytes, self.num_bytes)


def make_plan(specs: Sequence[TensorSpec], *, bucket_bytes: int) -> Plan:
    """Lay the tensors out one after another. Raises ValueError for no tensors, bad dtypes or a bucket below 1 byte."""
    if not specs:
        raise ValueError("nothing to transfer: no tensors")
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes must be >= 1, got {bucket_bytes}")
    offsets, position = [], 0
    for spec in specs:
        position = -(-position // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        offsets.append(position)
        position += spec.num_bytes
    return Plan(tuple(specs), tuple(offsets), position, bucket_bytes)
