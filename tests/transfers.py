"""A weight transfer in one process: the learner's publisher and replicas' real ends of it, over a group in memory.

What is not real: the model (a dict of tensors), and the network between the ends, which fails as told.
"""

import asyncio
import threading
import time
from collections import namedtuple
from contextlib import nullcontext
from dataclasses import dataclass, field

import httpx
import torch
from fastapi import FastAPI

from services.contracts.config import RunConfig
from services.contracts.registry import Replica
from services.contracts.settings import WeightsSection
from services.contracts.weights.communicator import PeerError
from services.contracts.weights.protocol import Join, Prepare
from services.contracts.weights.receiver import Receiver
from services.learner.calls import Calls
from services.learner.publish import Publisher
from services.rollout.weight_control import WeightControl, create_router

Meta = namedtuple("Meta", "name dtype shape")
TIMEOUT_S = 0.25
NUM_BROADCASTS = 5  # of a version: four buckets, and the shares of the fingerprint
CPU = torch.device("cpu")


class Policy:
    """A source of weights: 3.3 MB, so four buckets of 1 MiB; one tensor is larger than a bucket."""

    def __init__(self) -> None:
        self.tensors = {
            "embedding": torch.randn(3, 1 << 18).to(torch.bfloat16),
            "norm": torch.randn(7),
            "head": torch.randn(1 << 18),
            "bias": torch.randn(1 << 17),
        }
        self.delay_s = 0.0  # before each tensor

    def step(self) -> None:
        self.tensors = {name: tensor + 1 for name, tensor in self.tensors.items()}

    def metadata(self):
        return [Meta(name, tensor.dtype, tensor.shape) for name, tensor in self.tensors.items()]

    def __iter__(self):
        for item in self.tensors.items():
            time.sleep(self.delay_s)
            yield item


class ListRegistry:
    """The registry's part that the publisher uses."""

    def __init__(self) -> None:
        self.listed, self.told = [], []

    async def replicas(self):
        return self.listed

    async def publish(self, published):
        self.told.append(published)


@dataclass
class Fault:
    """What happens to a member's n-th broadcast of a version, the first `times` times. rank 0 is the sender."""

    kind: str  # fail, stall or corrupt
    member: str
    at: int
    times: float = 1

    def strikes(self, member: str, number: int) -> bool:
        hit = (member, number % NUM_BROADCASTS) == (self.member, self.at) and self.times > 0
        self.times -= hit
        return hit


class Network:
    """All groups; `faults` are what is wrong with them."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.groups: dict[int, Group] = {}
        self.lock = threading.Lock()

    def enter(self, join: Join, *, device, name="learner", store=None, cancelled=None) -> "Link":
        with self.lock:
            group = self.groups.setdefault(join.generation, Group(join.world_size, join.bucket_s))
        return Link(self, group, name, is_sender=join.rank == 0)


@dataclass
class Group:
    world_size: int
    bucket_s: float
    sent: dict[int, torch.Tensor] = field(default_factory=dict)
    num_taken: dict[int, int] = field(default_factory=dict)
    is_closed: bool = False
    changed: threading.Condition = field(default_factory=threading.Condition)


class Link:
    """A member's communicator."""

    device = CPU

    def __init__(self, network: Network, group: Group, name: str, *, is_sender: bool) -> None:
        self._network, self._group, self._name, self._is_sender = network, group, name, is_sender
        self._count = 0

    def start(self, tensor: torch.Tensor) -> "Flight":
        number, self._count = self._count, self._count + 1
        with self._network.lock:
            hit = next((f.kind for f in self._network.faults if f.strikes(self._name, number)), None)
        if hit == "fail":
            self.close()
            raise PeerError(f"{self._name} lost its connection")
        if self._is_sender:
            data = tensor.clone()
            if hit == "corrupt":
                data.view(torch.uint8)[3] ^= 64
            with self._group.changed:
                if hit != "stall":
                    self._group.sent[number] = data
                self._group.changed.notify_all()
        return Flight(self._group, number, tensor, hit, is_sender=self._is_sender)

    def stream(self):
        return nullcontext()

    def read(self, tensor: torch.Tensor) -> list[int]:
        return tensor.tolist()

    def close(self) -> None:
        with self._group.changed:
            self._group.is_closed = True
            self._group.changed.notify_all()


class Flight:
    def __init__(self, group: Group, number: int, tensor: torch.Tensor, hit: str | None, *, is_sender: bool) -> None:
        self._group, self._number, self._tensor, self._hit, self._is_sender = group, number, tensor, hit, is_sender

    def wait(self) -> None:
        group, number = self._group, self._number
        with group.changed:

            def is_done() -> bool:
                if self._is_sender:
                    return group.num_taken.get(number, 0) == group.world_size - 1
                return number in group.sent and self._hit != "stall"

            if not group.changed.wait_for(lambda: is_done() or group.is_closed, group.bucket_s):
                raise PeerError(f"bucket {number}: nothing for {group.bucket_s} s")
            if not is_done():
                raise PeerError(f"bucket {number}: the group was closed")
            if not self._is_sender:
                self._tensor.copy_(group.sent[number])
                if self._hit == "corrupt":
                    self._tensor.view(torch.uint8)[3] ^= 64
                group.num_taken[number] = group.num_taken.get(number, 0) + 1
                group.changed.notify_all()


class DictEngine:
    """A replica's engine: the worker calls of a transfer on the real receiver, and a dict for a model."""

    broken, version = "", 0

    def __init__(self, network: Network | None = None, name: str = "replica-0") -> None:
        network = network or Network()
        self.weights: dict[str, torch.Tensor] = {}
        self.receiver = Receiver(CPU, rank=0, enter=lambda join, device: network.enter(join, device=device, name=name))
        self.async_llm = self  # as vLLM's AsyncLLM
        self.is_generating, self.pauses = True, []
        self.load_error: Exception | None = None

    async def rpc(self, method, kwargs, timeout_s):
        return [getattr(self, method)(**kwargs)]

    def init_weight_transfer_engine(self, init_info):
        self.receiver.join(Join(**init_info["join"]))

    def start_weight_update(self):
        pass

    def update_weights(self, update_info):
        self.receiver.prepare(Prepare(**update_info["prepare"]))

    def finish_weight_update(self):
        assert not self.is_generating
        if self.load_error is not None:
            raise self.load_error
        self.weights = {name: tensor.clone() for name, tensor in self.receiver.take()}

    weights_finish_file = finish_weight_update

    def weights_stage_file(self, path):
        self.receiver.read_file(path)

    def weights_status(self):
        return self.receiver.status()

    def weights_abort(self):
        self.receiver.leave()

    async def pause_generation(self, *, mode, clear_cache):
        self.is_generating = False
        self.pauses.append((mode, clear_cache))

    async def resume_generation(self):
        self.is_generating = True

    async def update_weight_version(self, version):
        pass


class Site:
    """Replicas and a publisher for them."""

    def __init__(self, num_replicas: int, **weights) -> None:
        self.network, self.registry, self.policy = Network(), ListRegistry(), Policy()
        names = [f"replica-{i}" for i in range(num_replicas)]
        self.engines = {name: DictEngine(self.network, name) for name in names}
        self.controls = {name: WeightControl(engine) for name, engine in self.engines.items()}
        self.silent: set[str] = set()  # their HTTP answers no more
        self.registry.listed = [
            Replica(
                replica_id=name, url=f"http://{name}", world_size=1, version=0, device="cpu", state="ready", pid=1,
                started_at=1.0,
            )
            for name in names
        ]  # fmt: skip
        client = httpx.AsyncClient(mounts={f"http://{name}": self._transport(name) for name in names})
        settings = {"bucket_mb": 1, "timeout_s": TIMEOUT_S, "min_mb_per_s": 1000.0} | weights
        self.publisher = Publisher(
            self.registry,
            RunConfig(weights=WeightsSection(**settings)),
            self.policy,
            calls=Calls(client, token=""),
            enter=self.network.enter,
        )

    def _transport(self, name: str) -> httpx.AsyncBaseTransport:
        app = FastAPI()
        app.include_router(create_router(self.controls[name]))
        inner = httpx.ASGITransport(app)
        site = self

        class Line(httpx.AsyncBaseTransport):
            async def handle_async_request(self, request):
                if name in site.silent:
                    await asyncio.sleep(60)
                return await inner.handle_async_request(request)

        return Line()

    def holders(self, version: int) -> set[str]:
        """Replicas that are wholly at `version`, whose weights are the policy's present ones."""
        return {
            name
            for name, engine in self.engines.items()
            if engine.version == version
            and engine.weights.keys() == self.policy.tensors.keys()
            and all(torch.equal(engine.weights[key], value) for key, value in self.policy.tensors.items())
        }
