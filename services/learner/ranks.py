"""What the learner's ranks tell each other: commands, the batch, sums. Rank 0 leads, the others follow.

Everything here travels over a gloo group on CPUs, whatever the gradients use, because a follower may wait here for
minutes while rank 0 waits for trajectories, and gloo gives up after a deadline with an error instead of hanging a GPU.
With one rank every method is a no-op.
"""

import os
import socket
from collections.abc import Sequence
from datetime import timedelta
from enum import IntEnum

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed.rendezvous import rendezvous

from services.learner.liveness import Liveness


class Command(IntEnum):
    """What rank 0 asks of the others; each carries one integer."""

    TRAIN = 1  # value: the version trained from; the batch follows
    GATHER = 2  # value: group of weights to gather for publishing (ZeRO-3)
    SAVE = 3  # value: the version to save
    STOP = 4
    ASK = 5  # value: the version; part of a batch follows
    GO_ON = 6  # the actor's new weights have been gathered: the critic's steps are next


class Ranks:
    """The process group of the learner. `Ranks.join()` in every process, once."""

    def __init__(
        self,
        *,
        rank: int,
        local_rank: int,
        world: int,
        control: dist.ProcessGroup | None,
        liveness: Liveness | None = None,
    ) -> None:
        self.rank, self.local_rank, self.world = rank, local_rank, world
        self._control, self._liveness = control, liveness

    @classmethod
    def join(cls, *, backend: str, timeout_s: float, lost_s: float = 600.0) -> "Ranks":
        """Form the group out of RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; alone when they are unset.

        backend: "gloo" or "nccl", for the gradients. timeout_s: deadline of every collective, also how long a
        follower waits for the next command. lost_s: a rank that gives no sign of life for so long ends all. Raises
        torch.distributed.DistError when ranks are missing.
        """
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        local_rank = int(os.environ.get("LOCAL_RANK", str(rank)))
        if world == 1:  # DeepSpeed looks for these, and a port of its own choosing spares it a clash
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
            os.environ.setdefault("MASTER_PORT", str(_free_port()))
        deadline = timedelta(seconds=timeout_s)
        store, _, _ = next(rendezvous("env://", rank, world, timeout=deadline))
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=deadline)
        if world == 1:
            return cls(rank=rank, local_rank=local_rank, world=world, control=None)
        control = dist.new_group(backend="gloo", timeout=deadline)
        liveness = Liveness(store.clone(), rank=rank, world=world, timeout_s=lost_s)
        liveness.announce()
        dist.barrier(group=control)
        liveness.start()
        return cls(rank=rank, local_rank=local_rank, world=world, control=control, liveness=liveness)

    def leave(self) -> None:
        """Close the group, all ranks together."""
        if self._liveness is not None:
            self._liveness.stop()
            dist.barrier(group=self._control)
        dist.destroy_process_group()

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def command(self, command: Command, value: int = 0) -> None:
        """Rank 0: tell the others what comes next."""
        if self.world > 1:
            dist.broadcast(torch.tensor([int(command), value]), src=0, group=self._control)

    def await_command(self) -> tuple[Command, int]:
        """The others: what comes next. Raises RuntimeError when rank 0 is gone or says nothing in time."""
        message = torch.zeros(2, dtype=torch.int64)
        dist.broadcast(message, src=0, group=self._control)
        command, value = message.tolist()
        return Command(command), value

    def share(self, messages: Sequence[bytes] | None) -> list[bytes]:
        """Rank 0's byte strings on every rank (msgpack list in one uint8 tensor)."""
        if self.world == 1:
            assert messages is not None
            return list(messages)
        data = msgspec.msgpack.encode(messages) if self.leads else b""
        size = torch.tensor([len(data)])
        dist.broadcast(size, src=0, group=self._control)
        buffer = (
            torch.frombuffer(bytearray(data), dtype=torch.uint8)
            if self.leads
            else torch.empty(int(size), dtype=torch.uint8)
        )
        dist.broadcast(buffer, src=0, group=self._control)
        return (
            list(messages or ()) if self.leads else msgspec.msgpack.decode(buffer.numpy().tobytes(), type=list[bytes])
        )

    def sum(self, values: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
        """Element-wise sum over ranks, float64."""
        total = torch.tensor(np.asarray(values, dtype=np.float64))
        if self.world > 1:
            dist.all_reduce(total, group=self._control)
        summed: NDArray[np.float64] = total.numpy()
        return summed

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier(group=self._control)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
