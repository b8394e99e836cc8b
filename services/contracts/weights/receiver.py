"""A replica's worker in a transfer: enters groups and receives versions on threads of its own, and tells how far it is.

Nothing here touches a model, and nothing blocks: generation goes on meanwhile.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from services.contracts.weights.communicator import Communicator, TransferError, join_group
from services.contracts.weights.file import read
from services.contracts.weights.protocol import Join, Prepare
from services.contracts.weights.staging import Arena, Received, receive

HOST = torch.device("cpu")


class Reception:
    """A version coming in, on a thread of its own. Abandoned by dropping it: the thread ends at its next deadline.

    work: fills the arena. on_error: called at once when it fails.
    """

    def __init__(
        self, arena: Arena, work: Callable[[], Received], *, on_error: Callable[[], None] | None = None
    ) -> None:
        self.error: BaseException | None = None
        self.seconds = 0.0
        self._arena, self._work, self._on_error = arena, work, on_error
        self._received: Received | None = None
        self._thread = threading.Thread(target=self._run, name="weights", daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether bytes are still awaited."""
        return self._thread.is_alive()

    @property
    def fingerprint(self) -> str:
        """Of what came; empty until it has."""
        return self._received.fingerprint if self._received else ""

    @property
    def fingerprint_s(self) -> float:
        """Seconds spent on it."""
        return self._received.fingerprint_s if self._received else 0.0

    def wait(self) -> list[tuple[str, torch.Tensor]]:
        """The tensors, once they are all there. Raises what went wrong."""
        self._thread.join()  # bounded: each broadcast in it has a deadline
        if self.error is not None:
            raise self.error
        assert self._received is not None
        return self._arena.tensors(self._received.plan)

    def _run(self) -> None:
        started = time.monotonic()
        try:
            self._received = self._work()
        except Exception as error:  # noqa: BLE001 - handed to whoever asks: status, wait
            self.error = error
            if self._on_error is not None:
                self._on_error()  # a member that sees an error wakes the others by leaving
        self.seconds = time.monotonic() - started


class Formation:
    """A group being entered, on a thread of its own."""

    def __init__(self, enter: Callable[[], Communicator]) -> None:
        self.error: BaseException | None = None
        self.communicator: Communicator | None = None
        self._enter, self._is_abandoned, self._lock = enter, False, threading.Lock()
        self._thread = threading.Thread(target=self._run, name="group", daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether members are still awaited."""
        return self._thread.is_alive()

    def abandon(self) -> None:
        """Leave the group, now or as soon as it has formed."""
        with self._lock:
            self._is_abandoned = True
            communicator, self.communicator = self.communicator, None
        if communicator is not None:
            communicator.close()

    def _run(self) -> None:
        try:
            communicator = self._enter()
        except Exception as error:  # noqa: BLE001 - told by status
            self.error = error
            return
        with self._lock:
            if not self._is_abandoned:
                self.communicator = communicator
                return
        communicator.close()


class Receiver:
    """One worker's end. device: its GPU, or the CPU. rank: among its replica's workers. enter: how to enter a group."""

    def __init__(self, device: torch.device, *, rank: int, enter: Callable[..., Communicator] = join_group) -> None:
        self._device, self._rank, self._enter = device, rank, enter
        self._arena = Arena(HOST)
        self._formation: Formation | None = None
        self._reception: Reception | None = None

    def join(self, join: Join) -> None:
        """Begin to enter the group; an earlier one is left first."""
        self.leave()
        # With NCCL, "device" is one more copy of the weights in GPU memory. Over gloo the bytes arrive on the host.
        place = self._device if (join.transport, join.staging) == ("nccl", "device") else HOST
        if self._arena.device != place:
            self._arena = Arena(place)
        own = join.model_copy(update={"rank": join.rank + self._rank})
        self._formation = Formation(lambda: self._enter(own, device=self._device))

    def prepare(self, prepare: Prepare) -> None:
        """Begin to receive. Raises TransferError outside a group."""
        communicator = self._formation.communicator if self._formation is not None else None
        if communicator is None:
            raise TransferError("not in a group")
        arena, plan = self._arena, prepare.plan()
        self._reception = Reception(arena, lambda: receive(arena, communicator, plan), on_error=communicator.close)

    def read_file(self, path: Path) -> None:
        """Begin to read a published version instead."""
        arena = self._arena if self._arena.device == HOST else Arena(HOST)
        self._reception = Reception(arena, lambda: read(path, arena))

    def take(self) -> list[tuple[str, torch.Tensor]]:
        """The staged tensors, by name; they are valid until the next `prepare`. Raises TransferError without any."""
        reception, self._reception = self._reception, None
        if reception is None:
            raise TransferError("nothing was received: there is no version to swap in")
        return reception.wait()

    def wait(self) -> None:
        """Until a reception under way has ended. Raises what it raised."""
        if self._reception is not None:
            self._reception.wait()

    def status(self) -> dict[str, Any]:
        """`state`: idle, joining, joined, receiving, staged or failed; `error`, and `kind`, its class's name."""
        told: dict[str, Any] = {"state": "idle", "fingerprint": "", "receive_s": 0.0, "fingerprint_s": 0.0}
        active: Formation | Reception | None = self._reception or self._formation
        if active is not None and active.error is not None:
            return told | {"state": "failed", "error": str(active.error), "kind": type(active.error).__name__}
        if isinstance(active, Reception):
            told["state"] = "receiving" if active.is_running else "staged"
            told["receive_s"], told["fingerprint"] = active.seconds, active.fingerprint
            told["fingerprint_s"] = active.fingerprint_s
        elif active is not None:
            told["state"] = "joined" if active.communicator is not None else "joining"
        return told | {"error": "", "kind": ""}

    def leave(self) -> None:
        """Leave the group and forget what was received, without waiting for either."""
        if self._formation is not None:
            self._formation.abandon()
        if self._reception is not None and self._reception.is_running:
            self._arena = Arena(self._arena.device)  # the abandoned thread may still write into the old one
        self._formation = self._reception = None
