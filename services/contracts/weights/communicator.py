"""Moving buckets between the learner's sender and the replicas: one surface over gloo (here) and NCCL (`nccl`).

Every operation has a deadline. There is no recovery inside a group: on any error a member closes its communicator
at once (its closed sockets are what wakes the others) and a new group is formed by the learner.
"""

import contextlib
import threading
import time
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Protocol

import torch
from torch.distributed import BroadcastOptions, DistError, PrefixStore, ProcessGroupGloo, TCPStore, Work

from services.contracts.weights.protocol import Join

SENDER = 0  # rank of the learner's sender
ARRIVAL_PERIOD_S = 0.002


class TransferError(RuntimeError):
    """A transfer did not complete; the group it ran in is gone."""


class PeerError(TransferError):
    """The group broke or fell silent: any member may be the cause, and this one need not be."""


class MismatchError(TransferError):
    """What arrived is not what was sent."""


class Transfer(Protocol):
    """A broadcast under way."""

    def wait(self) -> None:
        """Until it is done; at most the group's deadline of one bucket. Raises PeerError."""


class Communicator(Protocol):
    """A formed group, seen from one member."""

    device: torch.device
    """Where tensors must be."""

    def start(self, tensor: torch.Tensor) -> Transfer:
        """Send `tensor` (uint8 or int64, contiguous) if this is the sender, else fill it. Raises PeerError.

        What is started first is done first. The tensor must stay until the transfer was waited for.
        """

    def stream(self) -> AbstractContextManager[object]:
        """Operations on tensors inside come after what was waited for and before what is started later."""

    def read(self, tensor: torch.Tensor) -> list[int]:
        """The values of an int64 tensor that was computed inside `stream`. Raises PeerError past the deadline."""

    def close(self) -> None:
        """Leave the group. Never raises, may be called twice, and from another thread."""


class GlooTransfer:
    """See Transfer."""

    def __init__(self, work: Work) -> None:
        self._work: Work | None = work

    def wait(self) -> None:
        """See Transfer. A dead peer is noticed in milliseconds, a silent one after the group's deadline.

        The work is let go of here, and no traceback keeps it: gloo's sockets stay open as long as anybody holds one.
        """
        work, self._work = self._work, None
        if work is None:
            return
        try:
            work.wait()
        except RuntimeError as error:
            reason = str(error)
        else:
            return
        finally:
            del work
        raise PeerError(f"broadcast failed: {reason}")


class GlooCommunicator:
    """A gloo group of its own, apart from torch's global one. Tensors are in host memory."""

    device = torch.device("cpu")

    def __init__(self, store: TCPStore, *, join: Join) -> None:
        options = ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=join.rendezvous_s)
        if _is_loopback(join.host):
            options._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        else:
            options._devices = [ProcessGroupGloo.create_default_device()]
        options._threads = 1  # several would let a later bucket overtake an earlier one's deadline
        self._options = BroadcastOptions()
        self._options.rootRank = SENDER
        self._options.rootTensor = 0
        self._options.timeout = timedelta(seconds=join.bucket_s)
        self._store = store  # kept: the group uses it as long as it lives
        try:
            self._group: ProcessGroupGloo | None = ProcessGroupGloo(
                PrefixStore(f"generation-{join.generation}", store), join.rank, join.world_size, options
            )
        except RuntimeError as error:
            raise PeerError(f"group {join.generation} did not form: {error}") from error

    def start(self, tensor: torch.Tensor) -> GlooTransfer:
        """See Communicator."""
        group = self._group
        if group is None:
            raise PeerError("this communicator is closed")
        try:
            return GlooTransfer(group.broadcast([tensor], self._options))
        except RuntimeError as error:
            raise PeerError(f"broadcast failed: {error}") from error

    def stream(self) -> AbstractContextManager[object]:
        """See Communicator."""
        return contextlib.nullcontext()

    def read(self, tensor: torch.Tensor) -> list[int]:
        """See Communicator."""
        values: list[int] = tensor.tolist()
        return values

    def close(self) -> None:
        """See Communicator."""
        group, self._group = self._group, None
        if group is not None:
            group.shutdown()


def open_store(host: str, *, timeout_s: float) -> TCPStore:
    """The sender's meeting point on a free port (`store.port`)."""
    return TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))


def join_group(
    join: Join, *, device: torch.device, store: TCPStore | None = None, cancelled: threading.Event | None = None
) -> Communicator:
    """Enter the group that `join` describes; blocks until all members are there. Raises PeerError.

    device: for NCCL, this member's GPU. store: the sender's own; a replica meets it at join.host:join.port.
    cancelled: set while waiting, it sends everybody home.
    """
    store = store or meet(join)
    started = time.monotonic()
    await_all(store, join, cancelled=cancelled)
    if join.transport == "gloo":
        return GlooCommunicator(store, join=join)
    from services.contracts.weights.nccl import form_nccl

    return form_nccl(join, device=device, timeout_s=max(1.0, join.rendezvous_s - (time.monotonic() - started)))


def meet(join: Join) -> TCPStore:
    """A replica's way to the sender's store. Raises PeerError."""
    try:
        patience = timedelta(seconds=join.rendezvous_s)
        return TCPStore(join.host, join.port, is_master=False, wait_for_workers=False, timeout=patience)
    except RuntimeError as error:
        raise PeerError(f"no sender at {join.host}:{join.port}: {error}") from error


def await_all(store: TCPStore, join: Join, *, count: int = 1, cancelled: threading.Event | None = None) -> None:
    """Meet in the store first: forming a group that lacks a member takes its deadline, and for NCCL has none.

    count: of the group's ranks, how many this call speaks for. Raises PeerError.
    """
    arrived, given_up = f"arrived-{join.generation}", f"given-up-{join.generation}"
    deadline = time.monotonic() + join.rendezvous_s
    try:
        number = store.add(arrived, count)
        while number < join.world_size:
            if cancelled is not None and cancelled.is_set():
                store.set(given_up, "yes")
            if store.check([given_up]):
                raise PeerError(f"group {join.generation} was given up: a member refused")
            if time.monotonic() > deadline:
                raise PeerError(f"group {join.generation} did not form within {join.rendezvous_s:g} s")
            time.sleep(ARRIVAL_PERIOD_S)
            number = store.add(arrived, 0)
    except DistError as error:
        raise PeerError(f"the sender of group {join.generation} is gone: {error}") from error


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")
