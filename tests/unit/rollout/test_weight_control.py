"""A replica's end of a transfer: pauses outlive swaps, faults are told from the group's, a spoilt model is told."""

import asyncio

import pytest
from fastapi import HTTPException
from transfers import CPU, DictEngine, Network, Policy

from services.contracts.weights.fingerprint import fingerprint
from services.contracts.weights.plan import TensorSpec, make_plan
from services.contracts.weights.protocol import Commit, Join, Prepare
from services.contracts.weights.staging import Arena, send
from services.rollout.weight_control import WeightControl

JOIN = Join(generation=3, host="", port=1, rank=1, world_size=2, transport="gloo", rendezvous_s=1, bucket_s=2)
PLAN = make_plan(
    [TensorSpec(m.name, str(m.dtype).removeprefix("torch."), tuple(m.shape)) for m in Policy().metadata()],
    bucket_bytes=1 << 20,
)


def commit(found: str, mode: str = "keep", version: int = 1) -> Commit:
    return Commit(generation=3, version=version, mode=mode, fingerprint=found, drain_s=1, load_s=1)


class Replica:
    def __init__(self) -> None:
        self.network = Network()
        self.engine = DictEngine(self.network)
        self.control = WeightControl(self.engine)

    async def stage(self, *, is_broken: bool = False) -> str:
        """Send it version 1; the fingerprint."""
        await self.control.join(JOIN)
        sender, arena = self.network.enter(JOIN.model_copy(update={"rank": 0}), device=CPU), Arena(CPU)
        arena.reserve(PLAN.num_bytes)
        message = Prepare(
            generation=3,
            version=1,
            names=[spec.name for spec in PLAN.specs],
            dtypes=[spec.dtype for spec in PLAN.specs],
            shapes=[list(spec.shape) for spec in PLAN.specs],
            bucket_bytes=PLAN.bucket_bytes,
            deadline_s=5,
        )
        if is_broken:
            sender.close()
        receiving = asyncio.create_task(self.control.prepare(message))
        if not is_broken:
            await asyncio.to_thread(send, arena, sender, PLAN, known=[], before=lambda end: None)
        await receiving
        return fingerprint(arena.shares(PLAN))


@pytest.fixture
def replica():
    return Replica()


async def test_a_swap_pauses_loads_and_goes_on(replica):
    found = await replica.stage()
    await replica.control.commit(commit(found))
    assert replica.engine.is_generating and replica.engine.version == 1 and replica.control.is_delivered
    assert replica.engine.pauses == [("keep", True)] and replica.control.history[-1].digest == found


@pytest.mark.parametrize("mode", ["keep", "wait", "abort"])
async def test_a_pause_outlives_a_swap(replica, mode):
    found = await replica.stage()
    await replica.control.pause()
    await replica.control.commit(commit(found, mode))
    assert replica.engine.version == 1 and not replica.engine.is_generating
    assert replica.engine.pauses[-1] == ("keep", True)  # none is let go on to its end, none is aborted
    await replica.control.resume()
    assert replica.engine.is_generating


async def test_whoever_resumes_during_a_swap_waits_for_its_end(replica):
    found = await replica.stage()
    await replica.control.pause()
    swapping = asyncio.create_task(replica.control.commit(commit(found)))
    await asyncio.sleep(0)
    await replica.control.resume()  # the load asserts that nothing is generated
    await swapping
    assert replica.engine.is_generating and replica.engine.version == 1


async def test_another_fingerprint_than_the_learners_is_refused(replica):
    await replica.stage()
    with pytest.raises(HTTPException) as raised:
        await replica.control.commit(commit("f" * 16))
    assert raised.value.status_code == 409 and replica.engine.version == 0 and not replica.control.is_delivered


async def test_a_broken_group_is_told_as_nobodys_fault(replica):
    with pytest.raises(HTTPException) as raised:
        await replica.stage(is_broken=True)
    assert raised.value.status_code == 424
    with pytest.raises(HTTPException) as raised:
        await replica.control.commit(commit(""))
    assert raised.value.status_code == 409


async def test_a_load_that_fails_marks_the_engine_and_generation_is_not_left_stopped(replica):
    found = await replica.stage()
    replica.engine.load_error = RuntimeError("no memory")
    with pytest.raises(HTTPException) as raised:
        await replica.control.commit(commit(found))
    assert raised.value.status_code == 500 and "half-way" in replica.engine.broken and replica.engine.is_generating


class DirectEngine(DictEngine):
    """vLLM's own engine: loads while it receives."""

    loaded = "feed"

    def update_weights(self, update_info):
        assert not self.is_generating and set(update_info) == {"names", "dtype_names", "shapes"}

    def finish_weight_update(self):
        pass

    def weights_status(self):
        return {"state": "idle", "fingerprint": self.loaded}


async def test_direct_staging_receives_inside_the_swap_and_a_wrong_fingerprint_spoils_the_replica():
    engine = DirectEngine()
    control = WeightControl(engine)
    control._generation, control._direct = 3, True
    message = Prepare(
        generation=3, version=1, names=["a"], dtypes=["float32"], shapes=[[1]], bucket_bytes=1, deadline_s=1
    )
    await control.prepare(message)
    assert engine.is_generating and not engine.pauses
    await control.commit(commit("feed"))
    assert engine.version == 1 and not engine.broken
    await control.prepare(message.model_copy(update={"version": 2}))
    with pytest.raises(HTTPException):
        await control.commit(commit("beef", version=2))
    assert "feed" in engine.broken and engine.version == 1
