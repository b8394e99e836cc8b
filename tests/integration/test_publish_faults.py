"""The sender against communicators that fail, stall and corrupt at every bucket: versions land whole, or not at all."""

import asyncio
import math

import pytest
from transfers import NUM_BROADCASTS, Fault, Site

from services.learner import publish

pytestmark = pytest.mark.integration
EVERYWHERE = [(kind, at) for kind in ("fail", "stall", "corrupt") for at in range(NUM_BROADCASTS)]
NAMES = {"replica-0", "replica-1", "replica-2"}


@pytest.fixture(autouse=True)
def _short_probes(monkeypatch):
    monkeypatch.setattr(publish, "PROBE_S", 1.0)
    monkeypatch.setattr(publish, "EXCLUDED_S", 0.0)


@pytest.fixture
async def site():
    made = Site(3)
    await made.publisher.publish(1)
    assert made.holders(1) == NAMES
    made.policy.step()
    yield made
    await made.publisher.close()


@pytest.mark.parametrize(("kind", "at"), EVERYWHERE)
async def test_a_fault_that_passes_costs_nobody_the_version(site, kind, at):
    site.network.faults = [Fault(kind, "replica-1", at)]
    report = await site.publisher.publish(2)
    assert (set(report.updated), report.dropped) == (NAMES, {}) and report.num_failed_groups >= 1
    assert site.holders(2) == NAMES


@pytest.mark.parametrize(("kind", "at"), EVERYWHERE)
async def test_a_fault_that_stays_costs_its_owner_alone(site, kind, at):
    old = site.engines["replica-1"].weights
    site.network.faults = [Fault(kind, "replica-1", at, times=math.inf)]
    report = await site.publisher.publish(2)
    assert (set(report.updated), set(report.dropped)) == (NAMES - {"replica-1"}, {"replica-1"})
    assert site.holders(2) == NAMES - {"replica-1"}
    assert site.engines["replica-1"].version == 1 and site.engines["replica-1"].weights is old
    site.network.faults = []  # it is cured: the next round has it again
    assert (await site.publisher.catch_up()).updated == ["replica-1"] and site.holders(2) == NAMES


@pytest.mark.parametrize(("kind", "at"), EVERYWHERE)
async def test_a_fault_of_the_senders_own_is_held_against_nobody(site, kind, at):
    site.network.faults = [Fault(kind, "learner", at)]
    report = await site.publisher.publish(2)
    assert (set(report.updated), report.dropped) == (NAMES, {}) and site.holders(2) == NAMES


@pytest.mark.parametrize("at", range(NUM_BROADCASTS))
async def test_a_replica_that_hangs_altogether_is_dropped_after_one_deadline(site, at, monkeypatch):
    monkeypatch.setattr(publish, "PROBE_S", 0.3)

    class Hanging(Fault):
        def strikes(self, member, number):
            if hit := super().strikes(member, number):
                site.silent.add("replica-1")
            return hit

    site.network.faults = [Hanging("stall", "replica-1", at)]
    report = await asyncio.wait_for(site.publisher.publish(2), 10)
    assert set(report.updated) == NAMES - {"replica-1"} and "no answer" in report.dropped["replica-1"]
    assert report.num_failed_groups == 1 and site.holders(2) == NAMES - {"replica-1"}


async def test_a_mismatch_is_counted(site):
    before = publish.FAILED_GROUPS.labels("mismatch")._value.get()
    site.network.faults = [Fault("corrupt", "replica-2", 1)]
    await site.publisher.publish(2)
    assert publish.FAILED_GROUPS.labels("mismatch")._value.get() == before + 1


async def test_slow_gathering_is_no_replicas_fault(site):
    site.policy.delay_s = 0.3  # longer than a bucket's deadline
    report = await site.publisher.publish(2)
    assert (set(report.updated), report.dropped) == (NAMES, {}) and site.holders(2) == NAMES
    assert publish.FAILED_GROUPS.labels("packing")._value.get() >= 1


async def test_a_source_that_breaks_is_raised(site):
    del site.policy.tensors["bias"]
    with pytest.raises(ValueError, match=r"expected .*bias.* yielded nothing more"):
        await asyncio.wait_for(site.publisher.publish(2), 20)


async def test_a_swap_that_fails_half_way_marks_the_replica_and_leaves_the_others(site):
    site.engines["replica-0"].load_error = RuntimeError("out of memory")
    report = await site.publisher.publish(2)
    assert set(report.updated) == NAMES - {"replica-0"} and "half-way" in report.dropped["replica-0"]
    assert "out of memory" in site.engines["replica-0"].broken


async def test_the_registry_is_told_before_and_after(site):
    versions = [(told.version, bool(told.fingerprint)) for told in site.registry.told]
    assert versions == [(1, False), (1, True)]
    await site.publisher.publish(2)
    assert site.controls["replica-0"].fingerprint == site.registry.told[-1].fingerprint
