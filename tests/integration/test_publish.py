"""Versions reach the replicas that live, whoever dies, hangs or receives garbage on the way."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch

from services.contracts.config import RunConfig
from services.contracts.registry import Replica
from services.contracts.settings import WeightsSection
from services.learner import publish
from services.learner.publish import Publisher

pytestmark = pytest.mark.integration

Meta = namedtuple("Meta", "name dtype shape")
TIMEOUT_S = 2.0


class Policy:
    """A source of weights: three tensors, one of them larger than a bucket; `step` changes every value."""

    def __init__(self):
        self.tensors = {
            "embedding": torch.randn(3, 1 << 20, dtype=torch.float32).to(torch.bfloat16),
            "norm": torch.randn(7, dtype=torch.float32),
            "head": torch.randn(1 << 18, dtype=torch.float32),
        }

    def step(self):
        self.tensors = {name: tensor + 1 for name, tensor in self.tensors.items()}

    def metadata(self):
        return [Meta(name, tensor.dtype, tensor.shape) for name, tensor in self.tensors.items()]

    def __iter__(self):
        return iter(self.tensors.items())

    def crcs(self):
        return {n: zlib.crc32(memoryview(t.view(torch.uint8).flatten().numpy())) for n, t in self.tensors.items()}


class ListRegistry:
    """The registry's part that the publisher reads."""

    def __init__(self):
        self.listed, self.published = [], None

    async def replicas(self):
        return self.listed

    async def publish(self, published):
        self.published = published


class StubProcess:
    """One stub replica in a process of its own."""

    def __init__(self, name):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("stub_replica.py")), str(self.port)]
        )
        self.replica = Replica(
            replica_id=name,
            url=self.url,
            world_size=1,
            version=0,
            device="cpu",
            state="ready",
            pid=self.process.pid,
            started_at=time.time(),
        )

    def wait(self):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                return httpx.get(f"{self.url}/weights").raise_for_status()
            time.sleep(0.1)
        raise TimeoutError(self.url)

    def weights(self):
        return httpx.get(f"{self.url}/weights", timeout=5).json()

    def signal(self, number):
        os.kill(self.process.pid, number)


class Saboteur:
    """A communicator that does something to the n-th broadcast."""

    device = torch.device("cpu")

    def __init__(self, inner, at, action):
        self.inner, self.at, self.action, self.count = inner, at, action, 0

    def start(self, tensor):
        if self.count == self.at:
            tensor = self.action(tensor)
        self.count += 1
        return self.inner.start(tensor)

    def stream(self):
        return self.inner.stream()

    def read(self, tensor):
        return self.inner.read(tensor)

    def close(self):
        self.inner.close()


@pytest.fixture
def stubs():
    started = [StubProcess(f"replica-{i}") for i in range(3)]
    try:
        for stub in started:
            stub.wait()
        yield started
    finally:
        for stub in started:
            stub.process.kill()
            stub.process.wait()


@pytest.fixture
async def publisher():
    config = RunConfig(weights=WeightsSection(bucket_mb=1, timeout_s=TIMEOUT_S))
    made = Publisher(ListRegistry(), config, Policy())
    yield made
    await made.close()


def listed(publisher, *stubs):
    publisher._registry.listed = [stub.replica for stub in stubs]


def sabotage(publisher, at, action):
    group = publisher._group
    publisher._group = replace(group, communicator=Saboteur(group.communicator, at, action))


async def test_publishing_to_nobody_is_no_error(publisher):
    report = await publisher.publish(1)
    assert (report.updated, report.dropped) == ([], {})
    assert publisher._registry.published.version == 1


async def test_versions_reach_whoever_lives(publisher, stubs, monkeypatch):
    """One scenario after another on the same processes, because each takes seconds to start."""
    first, second, third = stubs
    policy = publisher._source

    def holds(stub, version):
        return stub.weights() == {"version": version, "crcs": policy.crcs()}

    # Two replicas get a version; the group is kept for the next.
    listed(publisher, first, second)
    report = await publisher.publish(1)
    assert report.updated == ["replica-0", "replica-1"] and holds(first, 1) and holds(second, 1)
    generation = publisher._group.generation
    policy.step()
    await publisher.publish(2)
    assert publisher._group.generation == generation and holds(first, 2) and holds(second, 2)

    # A newcomer is served alone, between publications.
    listed(publisher, first, second, third)
    report = await publisher.catch_up()
    assert report.updated == ["replica-2"] and holds(third, 2)
    assert (await publisher.catch_up()).updated == []

    # Garbage on the way is refused by all, and sent again.
    policy.step()
    listed(publisher, third)
    sabotage(publisher, 1, lambda tensor: tensor.clone().fill_(7))
    report = await publisher.publish(3)
    assert report.updated == ["replica-2"] and holds(third, 3) and publisher._group.generation > generation

    # A replica that hangs costs a deadline; the others go on. When it wakes up, it is served again.
    listed(publisher, first, second, third)
    await publisher.catch_up()
    await publisher.publish(3)
    policy.step()
    monkeypatch.setattr(publish, "PROBE_S", 2.0)
    monkeypatch.setattr(publish, "EXCLUDED_S", 0.0)

    def hang(tensor):
        second.signal(signal.SIGSTOP)
        return tensor

    sabotage(publisher, 2, hang)
    report = await asyncio.wait_for(publisher.publish(4), 40)
    assert (set(report.updated), set(report.dropped)) == ({"replica-0", "replica-2"}, {"replica-1"}), report
    assert holds(first, 4) and holds(third, 4)
    second.signal(signal.SIGCONT)
    await asyncio.sleep(TIMEOUT_S + 0.5)
    assert second.weights()["version"] == 3
    assert (await publisher.catch_up()).updated == ["replica-1"] and holds(second, 4)

    # A replica that is killed is noticed at once.
    await publisher.publish(4)
    policy.step()

    def kill(tensor):
        second.signal(signal.SIGKILL)
        return tensor

    sabotage(publisher, 2, kill)
    report = await asyncio.wait_for(publisher.publish(5), 40)
    assert (set(report.updated), set(report.dropped)) == ({"replica-0", "replica-2"}, {"replica-1"}), report
    assert holds(first, 5) and holds(third, 5)
