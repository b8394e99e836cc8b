"""One version's bytes at one end of a transfer, and sending or receiving them bucket by bucket.

The bytes lie in an arena: memory of the GPU (one more copy of the weights there) or of the host. Where the
communicator wants tensors elsewhere (NCCL and an arena in host memory), buckets pass through a few of device memory.
Fingerprints are computed where a bucket arrives or leaves, while the next ones are under way.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from services.contracts.weights.communicator import Communicator, MismatchError, PeerError, Transfer
from services.contracts.weights.fingerprint import fingerprint, share
from services.contracts.weights.plan import Plan

IN_FLIGHT = 2  # buckets started beyond the one that is waited for


class Received(NamedTuple):
    """What is in an arena now."""

    plan: Plan
    fingerprint: str
    fingerprint_s: float  # spent on computing it


class Arena:
    """Room for one version, kept from one to the next: no page faults. In host memory it is pinned where CUDA is."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.data = torch.empty(0, dtype=torch.uint8, device=device)

    def reserve(self, num_bytes: int) -> None:
        """Have room for `num_bytes`. New room is zeros, as the padding between tensors must be."""
        if self.data.numel() < num_bytes:
            pin = self.device.type == "cpu" and torch.cuda.is_available()
            self.data = torch.empty(0, dtype=torch.uint8, device=self.device)  # the old goes first
            self.data = torch.zeros(num_bytes, dtype=torch.uint8, device=self.device, pin_memory=pin)

    def move(self, device: torch.device) -> None:
        """Have the bytes on `device`."""
        if self.device != device:
            old, size = self.data, self.data.numel()
            self.device, self.data = device, torch.empty(0, dtype=torch.uint8, device=device)
            self.reserve(size)
            self.data.copy_(old)

    def tensors(self, plan: Plan) -> list[tuple[str, torch.Tensor]]:
        """All tensors of the plan by name, as views."""
        return [
            (spec.name, self.data[at : at + spec.num_bytes].view(getattr(torch, spec.dtype)).view(spec.shape))
            for spec, at in zip(plan.specs, plan.offsets, strict=True)
        ]

    def shares(self, plan: Plan) -> list[int]:
        """Each bucket's share of the fingerprint, of what lies here now."""
        return [int(share(self.data[start:end], start)) for start, end in plan.buckets()]


class _Way:
    """Buckets between an arena and a communicator: slices of the arena, or slots on the communicator's device."""

    def __init__(self, arena: Arena, communicator: Communicator, plan: Plan) -> None:
        self._arena, self._communicator = arena, communicator
        self._slots: list[torch.Tensor] = []
        if arena.device.type != communicator.device.type:
            size, pin = min(plan.bucket_bytes, plan.num_bytes), communicator.device.type == "cpu"
            with communicator.stream():
                self._slots = [
                    torch.empty(size, dtype=torch.uint8, device=communicator.device, pin_memory=pin)
                    for _ in range(IN_FLIGHT + 2)
                ]

    def bucket(self, number: int, start: int, end: int) -> torch.Tensor:
        """The tensor that travels."""
        if not self._slots:
            return self._arena.data[start:end]
        return self._slots[number % len(self._slots)][: end - start]

    def load(self, bucket: torch.Tensor, start: int, end: int) -> None:
        """Fill it from the arena."""
        if self._slots:  # into host memory the copy must be complete when gloo begins: then it waits
            bucket.copy_(self._arena.data[start:end], non_blocking=bucket.is_cuda)

    def store(self, bucket: torch.Tensor, start: int, end: int) -> None:
        """Put what came into the arena."""
        if self._slots:
            self._arena.data[start:end].copy_(bucket, non_blocking=bucket.is_cuda)


def send(
    arena: Arena, communicator: Communicator, plan: Plan, *, known: Sequence[int], before: Callable[[int], None]
) -> list[int]:
    """Broadcast every bucket, then the shares of the fingerprint, which it returns.

    known: the shares where they were computed before. before: called with the number of bytes that must be in the
    arena before the next bucket goes; may raise TransferError. Closes the communicator when it raises.
    """
    way, shares, flying = _Way(arena, communicator, plan), [], deque[Transfer]()
    try:
        for number, (start, end) in enumerate(plan.buckets()):
            with communicator.stream():
                before(end)
                bucket = way.bucket(number, start, end)
                way.load(bucket, start, end)
            flying.append(communicator.start(bucket))
            if not known:
                with communicator.stream():
                    shares.append(share(bucket, start))
            if len(flying) > IN_FLIGHT:
                flying.popleft().wait()
        while flying:
            flying.popleft().wait()
        with communicator.stream():
            values = (
                torch.tensor(known, dtype=torch.int64, device=communicator.device) if known else torch.stack(shares)
            )
        communicator.start(values).wait()
        return communicator.read(values)
    except BaseException:
        _drain(flying)
        communicator.close()  # our closed sockets wake every receiver at once
        raise


def receive(arena: Arena, communicator: Communicator, plan: Plan) -> Received:
    """Fill the arena. Raises PeerError; MismatchError when other bytes came than were sent."""
    arena.reserve(plan.num_bytes)
    way, shares, spent = _Way(arena, communicator, plan), [], 0.0
    flying, arriving = deque[Transfer](), deque[tuple[torch.Tensor, int, int]]()

    def settle() -> None:
        nonlocal spent
        flying[0].wait()
        flying.popleft()
        bucket, start, end = arriving.popleft()
        with communicator.stream():
            began = time.monotonic()
            shares.append(share(bucket, start))
            spent += time.monotonic() - began
            way.store(bucket, start, end)

    try:
        for number, (start, end) in enumerate(plan.buckets()):
            bucket = way.bucket(number, start, end)
            arriving.append((bucket, start, end))
            flying.append(communicator.start(bucket))
            if len(flying) > IN_FLIGHT:
                settle()
        while flying:
            settle()
    except BaseException:
        _drain(flying)
        raise
    sent = torch.empty(len(shares), dtype=torch.int64, device=communicator.device)
    communicator.start(sent).wait()
    with communicator.stream():
        both = torch.cat([torch.stack(shares), sent])
    values = communicator.read(both)
    return Received(plan, _checked(values[: len(shares)], values[len(shares) :]), spent)


def _drain(flying: deque[Transfer]) -> None:
    """Wait for what was started: gloo keeps its sockets open for it, and closed sockets are what wakes the others."""
    while flying:
        with contextlib.suppress(PeerError):
            flying.popleft().wait()


def _checked(found: list[int], wanted: list[int]) -> str:
    wrong = [number for number, pair in enumerate(zip(found, wanted, strict=True)) if pair[0] != pair[1]]
    if wrong:
        raise MismatchError(f"buckets {wrong[:8]} of {len(found)} are not what was sent")
    return fingerprint(found)
