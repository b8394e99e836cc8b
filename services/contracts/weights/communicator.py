"""Moving buckets between the learner's sender and the replicas: one surface over gloo (CPU) and NCCL (GPU).

Every operation has a deadline. There is no recovery inside a group: on any error a member closes its communicator
at once (its closed sockets are what wakes the others) and a new group is formed by the learner.
"""

import base64
import time
import zlib
from datetime import timedelta
from typing import Protocol

import torch
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore

from services.contracts.weights.protocol import Join

SENDER = 0  # rank of the learner's sender
POLL_S = 0.0005  # between looks at a CUDA event


class TransferError(RuntimeError):
    """A transfer did not complete; the group it ran in is gone."""


class Communicator(Protocol):
    """A formed group, seen from one member."""

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Send `tensor` (uint8 or int64, contiguous) if this is the sender, else fill it. Raises TransferError."""

    def close(self) -> None:
        """Leave the group. Never raises, may be called twice."""


class GlooCommunicator:
    """A gloo group of its own, apart from torch's global one."""

    def __init__(self, store: TCPStore, *, join: Join) -> None:
        options = ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=join.rendezvous_s)
        if _is_loopback(join.host):
            options._devices = [ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        else:
            options._devices = [ProcessGroupGloo.create_default_device()]
        self._options = BroadcastOptions()
        self._options.rootRank = SENDER
        self._options.rootTensor = 0
        self._options.timeout = timedelta(seconds=join.timeout_s)
        self._store = store  # kept: the group uses it as long as it lives
        try:
            self._group: ProcessGroupGloo | None = ProcessGroupGloo(
                PrefixStore(f"generation-{join.generation}", store), join.rank, join.world_size, options
            )
        except RuntimeError as error:
            raise TransferError(f"group {join.generation} did not form: {error}") from error

    def broadcast(self, tensor: torch.Tensor) -> None:
        """See Communicator. A dead peer is noticed in milliseconds, a silent one after the group's timeout."""
        if self._group is None:
            raise TransferError("this communicator is closed")
        try:
            self._group.broadcast([tensor], self._options).wait()
        except RuntimeError as error:
            raise TransferError(f"broadcast failed: {error}") from error

    def close(self) -> None:
        """See Communicator."""
        group, self._group = self._group, None
        if group is not None:
            group.shutdown()


class NcclCommunicator:
    """vLLM's NCCL communicator on a stream of its own, watched instead of waited for.

    NCCL does not report a peer that was killed: the deadline is the detector. On expiry the communicator is aborted and
    whatever was received is garbage, which the digests would show as well.
    """

    def __init__(self, *, join: Join, device: torch.device) -> None:
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator

        assert join.nccl_id is not None, "transport nccl needs the unique id"
        self._timeout_s = join.timeout_s
        self._stream = torch.cuda.Stream(device)
        with torch.cuda.device(device):
            self._group = PyNcclCommunicator.from_unique_id_bytes(
                base64.b64decode(join.nccl_id), join.rank, join.world_size, device
            )
        if self._group.disabled:  # vLLM only logs that libnccl is missing
            raise TransferError("NCCL is not available in this process; set weights.transport = gloo")

    def broadcast(self, tensor: torch.Tensor) -> None:
        """See Communicator."""
        self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        self._group.broadcast(tensor, SENDER, self._stream)
        done = torch.cuda.Event()
        done.record(self._stream)
        deadline = time.monotonic() + self._timeout_s
        while not done.query():
            if time.monotonic() > deadline:
                self.close()
                raise TransferError(f"broadcast took longer than {self._timeout_s:g} s")
            time.sleep(POLL_S)

    def close(self) -> None:
        """See Communicator."""
        self._group.destroy()


def open_store(host: str, *, timeout_s: float) -> TCPStore:
    """The sender's meeting point on a free port (`store.port`)."""
    return TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))


def make_nccl_id() -> str:
    """A new NCCL unique id, base64."""
    from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

    return base64.b64encode(bytes(NCCLLibrary().ncclGetUniqueId().internal)).decode()


def join_group(join: Join, *, device: torch.device, store: TCPStore | None = None) -> Communicator:
    """Enter the group that `join` describes; blocks until all members are there. Raises TransferError.

    store: the sender's own; a replica meets it at join.host:join.port.
    """
    if store is None:
        try:
            patience = timedelta(seconds=join.rendezvous_s)
            store = TCPStore(join.host, join.port, is_master=False, wait_for_workers=False, timeout=patience)
        except RuntimeError as error:
            raise TransferError(f"no sender at {join.host}:{join.port}: {error}") from error
    if join.transport == "nccl":
        _await_all(store, join)
        return NcclCommunicator(join=join, device=device)
    return GlooCommunicator(store, join=join)


def digest(bucket: torch.Tensor) -> int:
    """Content digest of a uint8 bucket: CRC-32 on the CPU, a position-weighted 63-bit sum on a GPU.

    It guards against lost, stale or mixed-up bytes, not against an adversary. Both ends hold a bucket on the same kind
    of device, because the transport is chosen by it.
    """
    if bucket.device.type == "cpu":
        return zlib.crc32(bucket.numpy().data)
    whole = bucket[: bucket.numel() // 8 * 8].view(torch.int64)
    weights = torch.arange(1, whole.numel() + 1, device=bucket.device)
    tail = int(bucket[whole.numel() * 8 :].sum())
    return (int((whole * weights).sum()) ^ tail) & 0x7FFF_FFFF_FFFF_FFFF


def _await_all(store: TCPStore, join: Join) -> None:
    """Meet in the store first: ncclCommInitRank has no deadline, so nobody may enter it before all are here."""
    key = f"arrived-{join.generation}"
    store.add(key, 1)
    deadline = time.monotonic() + join.rendezvous_s
    while store.add(key, 0) < join.world_size:
        if time.monotonic() > deadline:
            raise TransferError(f"group {join.generation} did not form within {join.rendezvous_s:g} s")
        time.sleep(0.01)


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")
