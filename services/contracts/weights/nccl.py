"""NCCL between GPUs, through vLLM's communicator: watched, never waited for.

NCCL reports neither a peer that was killed nor one that hangs, and its calls have no deadlines. So the deadline is the
detector: work goes on a stream of its own, a CUDA event after each bucket is looked at until it is due, and then the
communicator is aborted. What was received is garbage then, and treated as such.
"""

import base64
import contextlib
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from services.contracts.weights.communicator import SENDER, PeerError
from services.contracts.weights.protocol import Join

SPINS = 200  # looks at an event before the first sleep: a bucket takes about as long
POLL_S = 0.0002  # between the looks that follow


class Event(Protocol):
    """A CUDA event."""

    def query(self) -> bool:
        """Whether all that was recorded before it is done."""


class NcclGroup(Protocol):
    """What is used of vLLM's PyNcclCommunicator."""

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any) -> None:
        """Enqueue a broadcast."""

    def destroy(self) -> None:
        """Abort; returns within seconds whatever is under way."""


class NcclTransfer:
    """See communicator.Transfer."""

    def __init__(self, event: Event, communicator: "NcclCommunicator") -> None:
        self._event, self._communicator = event, communicator

    def wait(self) -> None:
        """See Transfer. The deadline counts from now: what was started earlier has been waited for."""
        self._communicator.watch(self._event)


class NcclCommunicator:
    """A formed NCCL group. See communicator.Communicator; build it with `form_nccl`.

    stream: of this group alone. record: an event after all that is on it. as_current: makes it torch's current stream.
    """

    def __init__(
        self,
        group: NcclGroup,
        *,
        device: torch.device,
        stream: Any,
        record: Callable[[], Event],
        as_current: Callable[[], AbstractContextManager[object]],
        bucket_s: float,
    ) -> None:
        self.device = device
        self._group: NcclGroup | None = group
        self._stream, self._record, self._as_current, self._bucket_s = stream, record, as_current, bucket_s

    def start(self, tensor: torch.Tensor) -> NcclTransfer:
        """See Communicator."""
        group = self._group
        if group is None:
            raise PeerError("this communicator is closed")
        try:
            group.broadcast(tensor, SENDER, self._stream)
        except RuntimeError as error:  # NCCL's own report, of what it does notice
            self.close()
            raise PeerError(f"broadcast failed: {error}") from error
        return NcclTransfer(self._record(), self)

    def stream(self) -> AbstractContextManager[object]:
        """See Communicator."""
        return self._as_current()

    def read(self, tensor: torch.Tensor) -> list[int]:
        """See Communicator. `tolist` alone would wait on the stream without a deadline."""
        with self._as_current():
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            host.copy_(tensor, non_blocking=True)
        self.watch(self._record())
        values: list[int] = host.tolist()
        return values

    def watch(self, event: Event) -> None:
        """Return when the event has come; past the deadline abort the group. Raises PeerError."""
        deadline, looks = time.monotonic() + self._bucket_s, 0
        while not event.query():
            if self._group is None:
                raise PeerError("this communicator is closed")
            if time.monotonic() > deadline:
                self.close()
                raise PeerError(f"a broadcast took longer than {self._bucket_s:g} s")
            looks += 1
            if looks > SPINS:
                time.sleep(POLL_S)

    def close(self) -> None:
        """See Communicator."""
        group, self._group = self._group, None
        if group is not None:
            group.destroy()


def make_nccl_id() -> str:
    """A new NCCL unique id, base64."""
    from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

    return base64.b64encode(bytes(NCCLLibrary().ncclGetUniqueId().internal)).decode()


def nccl_version() -> str:
    """Of the library that vLLM loads."""
    from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

    return str(NCCLLibrary().ncclGetVersion())


def form_nccl(join: Join, *, device: torch.device, timeout_s: float) -> NcclCommunicator:
    """Form the group; all members must enter at about the same time. Raises PeerError."""
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.utils.nccl import unpinned_nccl_env

    assert join.nccl_id is not None, "transport nccl needs the unique id"
    unique_id = base64.b64decode(join.nccl_id)
    stream = torch.cuda.Stream(device)

    class Reachable(PyNcclCommunicator):
        """Handed out before it is formed, so that its formation can be aborted."""

        def _init_comm(self, device: Any) -> None:
            started.append(self)
            super()._init_comm(device)

    started: list[Any] = []

    def form() -> Any:
        # Its first collective is waited for on the current stream: let that be ours, which nothing else waits for.
        with torch.cuda.device(device), torch.cuda.stream(stream), unpinned_nccl_env():
            return Reachable.from_unique_id_bytes(unique_id, join.rank, join.world_size, device)

    def abort() -> None:
        for group in started:
            if hasattr(group, "comm"):
                group.destroy()

    group = call_with_deadline(form, timeout_s=timeout_s, abandon=abort)
    if group.disabled:  # vLLM only logs it
        raise PeerError("NCCL is not available in this process; set weights.transport = gloo")

    def record() -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(stream)
        return event

    return NcclCommunicator(
        group,
        device=device,
        stream=stream,
        record=record,
        as_current=lambda: _current(device, stream),
        bucket_s=join.bucket_s,
    )


def call_with_deadline(call: Callable[[], Any], *, timeout_s: float, abandon: Callable[[], None]) -> Any:
    """The call's result. A call that hangs is left behind on its thread, after `abandon`. Raises PeerError."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.extend((call(), None))
        except Exception as error:  # noqa: BLE001 - handed to who waits
            outcome.extend((None, error))

    thread = threading.Thread(target=run, name="nccl", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not outcome:
        abandon()
        raise PeerError(f"the NCCL group did not form within {timeout_s:g} s")
    result, error = outcome
    if error is not None:
        raise PeerError(f"the NCCL group did not form: {error}") from error
    return result


@contextlib.contextmanager
def _current(device: torch.device, stream: torch.cuda.Stream) -> Any:
    with torch.cuda.device(device), torch.cuda.stream(stream):
        yield
