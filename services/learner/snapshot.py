"""One version's weights, packed: filled out of the live parameters once, sent from as often as needed.

So a retry or a newcomer needs neither the other ranks nor the parameters, which training goes on to change. Sending
follows filling: under ZeRO-3, buckets go out while later tensors are still being gathered.
"""

import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from services.contracts.weights.communicator import Communicator, TransferError
from services.contracts.weights.fingerprint import fingerprint
from services.contracts.weights.plan import Plan, TensorSpec, make_plan
from services.contracts.weights.staging import Arena, send
from services.learner.calls import SourceError


class ParamMeta(Protocol):
    """Name, dtype and full shape of one tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class WeightSource(Protocol):
    """The policy's full weights under Hugging Face names; a tied head is absent. Re-iterable."""

    def metadata(self) -> Sequence[Any]:
        """A ParamMeta of each tensor, in the order of iteration."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, whole tensor)."""


class Snapshot:
    """Reused from version to version: `begin`, `fill` on one thread, `send` on another."""

    def __init__(self, source: WeightSource, *, bucket_bytes: int) -> None:
        specs = [TensorSpec(m.name, dtype_name(m.dtype), tuple(m.shape)) for m in source.metadata()]
        self.plan: Plan = make_plan(specs, bucket_bytes=bucket_bytes)
        self.arena = Arena(torch.device("cpu"))
        self.arena.reserve(self.plan.num_bytes)
        self._progress = threading.Condition()
        self._num_filled = 0  # bytes, from the start
        self._copied: torch.cuda.Event | None = None  # on a GPU: when they are really there
        self._has_failed = False
        self._shares: list[int] = []  # of the fingerprint, once a send or `fingerprint` has computed them

    def begin(self) -> None:
        """From now on senders wait for `fill`."""
        self._num_filled, self._copied, self._has_failed, self._shares = 0, None, False, []

    def fill(self, source: WeightSource) -> None:
        """Copy all tensors in. Raises ValueError when they are not the plan's, and what the source raises."""
        try:
            tensors = iter(source)
            for spec, (_, place) in zip(self.plan.specs, self.arena.tensors(self.plan), strict=True):
                name, tensor = next(tensors, ("nothing more", torch.empty(0)))
                if (name, dtype_name(tensor.dtype), tuple(tensor.shape)) != (spec.name, spec.dtype, spec.shape):
                    raise ValueError(f"expected {spec}, the source yielded {name} {tensor.dtype} {tuple(tensor.shape)}")
                place.copy_(tensor)
                self._advance(place)
            if next(tensors, None) is not None:
                raise ValueError("the source yielded more tensors than its metadata")
        except BaseException:
            with self._progress:
                self._has_failed = True
                self._progress.notify_all()
            raise

    def send(self, communicator: Communicator, *, cancelled: threading.Event, patience_s: float) -> None:
        """Broadcast the version. Raises TransferError, and has left the group then.

        patience_s: how long a bucket may wait to be filled, SourceError after that. cancelled: stop at the next bucket.
        """

        def until_filled(end: int) -> None:
            if cancelled.is_set():
                raise TransferError("a replica refused")
            with self._progress:
                self._progress.wait_for(lambda: self._num_filled >= end or self._has_failed, patience_s)
                if self._num_filled < end:
                    raise SourceError(f"{end - self._num_filled} bytes of a bucket were not there in {patience_s:g} s")
                if self._copied is not None:
                    self._copied.wait()

        self._shares = send(self.arena, communicator, self.plan, known=self._shares, before=until_filled)

    def send_directly(self, communicator: Communicator, *, chunk_bytes: int) -> None:
        """Broadcast the tensors as vLLM's own packed receiver expects them: see `chunks`. Raises TransferError."""
        try:
            for chunk in chunks(self.plan, chunk_bytes):
                with communicator.stream():
                    packed = torch.cat([self.arena.data[start:end] for start, end in chunk]).to(communicator.device)
                communicator.start(packed).wait()
        except BaseException:
            communicator.close()
            raise

    def fingerprint(self) -> str:
        """Of the filled snapshot."""
        self._shares = self._shares or self.arena.shares(self.plan)
        return fingerprint(self._shares)

    def _advance(self, place: torch.Tensor) -> None:
        """Note that all up to the end of `place` is filled; the padding that follows it is."""
        end = place.data_ptr() + place.nbytes - self.arena.data.data_ptr()
        copied = None
        if place.is_cuda or torch.cuda.is_available():
            copied = torch.cuda.Event()
            copied.record()
        with self._progress:
            self._num_filled, self._copied = end, copied
            self._progress.notify_all()


def chunks(plan: Plan, chunk_bytes: int) -> Iterator[list[tuple[int, int]]]:
    """The byte ranges of tensors that vLLM's packed receiver (`packed_tensor`) takes as one broadcast each.

    A chunk ends with the tensor that takes it past `chunk_bytes`; there is no padding between tensors.
    """
    chunk, size = [], 0
    for spec, offset in zip(plan.specs, plan.offsets, strict=True):
        chunk.append((offset, offset + spec.num_bytes))
        size += spec.num_bytes
        if size > chunk_bytes:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def dtype_name(dtype: torch.dtype) -> str:
    """As it travels: `bfloat16`."""
    return str(dtype).removeprefix("torch.")
