"""The snapshot: sending follows filling; vLLM's own receiver is sent what it expects."""

import threading

import pytest
import torch
from transfers import Network, Policy

from services.contracts.weights.plan import TensorSpec, make_plan
from services.contracts.weights.protocol import Join
from services.contracts.weights.staging import Arena, receive
from services.learner.calls import SourceError
from services.learner.snapshot import Snapshot, chunks

JOIN = Join(generation=1, host="", port=1, rank=0, world_size=2, transport="gloo", rendezvous_s=1, bucket_s=5)


def test_buckets_go_out_while_later_tensors_are_still_being_gathered():
    policy, network, order = Policy(), Network(), []
    snapshot, goes_on = Snapshot(policy, bucket_bytes=1 << 20), threading.Event()

    class Gathered(Policy):
        def __iter__(self):
            yield from list(policy)[:-1]
            assert goes_on.wait(10)  # the last tensor comes when most buckets have arrived
            yield list(policy)[-1]

    sender = network.enter(JOIN, device=None)
    receiver = network.enter(JOIN.model_copy(update={"rank": 1}), device=None, name="replica")
    started = receiver.start

    def start(tensor):
        order.append(tensor)
        if len(order) == 3:  # two beyond the first that is waited for
            goes_on.set()
        return started(tensor)

    receiver.start = start
    arena, found = Arena(torch.device("cpu")), []
    snapshot.begin()
    threads = [
        threading.Thread(target=snapshot.fill, args=(Gathered(),)),
        threading.Thread(target=lambda: found.append(receive(arena, receiver, snapshot.plan))),
    ]
    for thread in threads:
        thread.start()
    snapshot.send(sender, cancelled=threading.Event(), patience_s=10)
    for thread in threads:
        thread.join(10)
    assert found[0].fingerprint == snapshot.fingerprint()
    assert all(torch.equal(tensor, policy.tensors[name]) for name, tensor in arena.tensors(snapshot.plan))


def test_a_bucket_that_is_not_filled_in_time_is_the_sources_fault():
    snapshot = Snapshot(Policy(), bucket_bytes=1 << 20)
    snapshot.begin()
    link = Network().enter(JOIN, device=None)
    with pytest.raises(SourceError, match="were not there"):
        snapshot.send(link, cancelled=threading.Event(), patience_s=0.05)
    assert link._group.is_closed


def test_a_snapshot_refuses_another_model():
    snapshot, other = Snapshot(Policy(), bucket_bytes=1 << 20), Policy()
    other.tensors["norm"] = torch.zeros(8)
    snapshot.begin()
    with pytest.raises(ValueError, match=r"expected .*norm"):
        snapshot.fill(other)


def test_chunks_end_with_the_tensor_that_takes_them_past_the_limit():
    plan = make_plan([TensorSpec(name, "float32", (25,)) for name in "abcd"], bucket_bytes=1)  # 100 bytes each
    sizes = [[end - start for start, end in chunk] for chunk in chunks(plan, 150)]
    assert sizes == [[100, 100], [100, 100]]
    assert [len(chunk) for chunk in chunks(plan, 200)] == [3, 1]  # vLLM goes on while it is not past
