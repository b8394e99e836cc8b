"""The watched NCCL communicator against a group that is late, silent or broken: no call outlasts its deadline."""

import threading
import time
from contextlib import nullcontext

import pytest
import torch

from services.contracts.weights.communicator import PeerError
from services.contracts.weights.nccl import NcclCommunicator, call_with_deadline
from services.contracts.weights.plan import TensorSpec, make_plan
from services.contracts.weights.staging import Arena, receive, send

CPU = torch.device("cpu")


class Event:
    """Comes at the n-th look; never for None."""

    def __init__(self, looks: int | None) -> None:
        self.looks = looks

    def query(self) -> bool:
        if self.looks is None:
            return False
        self.looks -= 1
        return self.looks < 0


class Group:
    """What vLLM's communicator does: enqueue and return."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.sent, self.num_destroyed = error, [], 0

    def broadcast(self, tensor, src, stream):
        assert (src, stream) == (0, "stream")
        if self.error is not None:
            raise self.error
        self.sent.append(tensor.clone())

    def destroy(self):
        self.num_destroyed += 1


def communicator(group, *, looks=0, bucket_s=0.05):
    return NcclCommunicator(
        group, device=CPU, stream="stream", record=lambda: Event(looks), as_current=nullcontext, bucket_s=bucket_s
    )


def test_a_bucket_is_looked_at_until_it_is_done():
    group = Group()
    communicator(group, looks=500, bucket_s=30).start(torch.ones(3)).wait()
    assert len(group.sent) == 1 and group.num_destroyed == 0


def test_a_bucket_that_never_ends_aborts_the_group_at_its_deadline():
    group = Group()
    link = communicator(group, looks=None)
    transfer = link.start(torch.ones(3))
    started = time.monotonic()
    with pytest.raises(PeerError, match="longer than"):
        transfer.wait()
    assert time.monotonic() - started >= 0.05 and group.num_destroyed == 1
    with pytest.raises(PeerError, match="closed"):
        link.start(torch.ones(3))
    link.close()
    assert group.num_destroyed == 1


def test_reading_a_value_has_the_same_deadline():
    with pytest.raises(PeerError, match="longer than"):
        communicator(Group(), looks=None).read(torch.ones(2, dtype=torch.int64))
    assert communicator(Group(), looks=3).read(torch.tensor([4, 5])) == [4, 5]


def test_what_nccl_itself_reports_aborts_the_group():
    group = Group(RuntimeError("NCCL error: remote process exited"))
    with pytest.raises(PeerError, match="remote process exited"):
        communicator(group).start(torch.ones(3))
    assert group.num_destroyed == 1


def test_closing_ends_a_wait_on_another_thread():
    link = communicator(Group(), looks=None, bucket_s=60)
    transfer = link.start(torch.ones(3))
    threading.Timer(0.1, link.close).start()
    with pytest.raises(PeerError, match="closed"):
        transfer.wait()


def test_a_formation_that_hangs_is_left_behind_and_aborted():
    gate, abandoned = threading.Event(), []
    with pytest.raises(PeerError, match="did not form within"):
        call_with_deadline(gate.wait, timeout_s=0.05, abandon=lambda: abandoned.append(1))
    gate.set()
    assert abandoned == [1]


def test_a_formation_that_fails_says_why():
    def fail():
        raise OSError("no libnccl")

    with pytest.raises(PeerError, match="no libnccl"):
        call_with_deadline(fail, timeout_s=5, abandon=lambda: None)


class Wire(Group):
    """The receiver's end of what another group sent."""

    def __init__(self, source: Group) -> None:
        super().__init__()
        self.source, self.number = source, 0

    def broadcast(self, tensor, src, stream):
        tensor.copy_(self.source.sent[self.number])
        self.number += 1


def test_a_version_passes_whole():
    plan = make_plan([TensorSpec("a", "float32", (1000,)), TensorSpec("b", "bfloat16", (333,))], bucket_bytes=512)
    source, sent = Arena(CPU), Group()
    source.reserve(plan.num_bytes)
    for _, tensor in source.tensors(plan):
        tensor.copy_(torch.randn(tensor.shape))
    shares = send(source, communicator(sent, looks=5), plan, known=[], before=lambda end: None)
    target = Arena(CPU)
    received = receive(target, communicator(Wire(sent), looks=2), plan)
    assert torch.equal(target.data, source.data)
    assert source.shares(plan) == shares and received.fingerprint
