"""Weights to the replicas: who is in the group, the two phases, and what happens when somebody fails.

The learner's rank 0 packs each version once into a buffer of its own and sends from there, so a retry or a newcomer
needs neither the other ranks nor the live parameters. A failure never reaches training: the group is left at once,
whoever does not answer is dropped, and the rest are served again. How bytes move is `communicator`'s business.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import httpx
import torch

from services.contracts.config import RunConfig
from services.contracts.registry import Registry, Replica
from services.contracts.weights.communicator import (
    Communicator,
    TransferError,
    digest,
    join_group,
    make_nccl_id,
    open_store,
)
from services.contracts.weights.plan import Plan, TensorSpec, make_plan
from services.contracts.weights.protocol import Abort, Commit, Join, Prepare

RENDEZVOUS_S = 10.0  # formation takes milliseconds; longer means that somebody is missing
PROBE_S = 5.0  # a replica that does not even answer an abort in this time is hung
COMMIT_S = 120.0  # pausing in mode "wait" lets requests finish
ATTEMPTS = 3
STRIKES = 2  # failed transfers after which a replica that does answer is dropped all the same
EXCLUDED_S = 30.0  # a dropped replica that lives on is tried again after this

log = logging.getLogger(__name__)


class ParamMeta(Protocol):
    """Name, dtype and full shape of one tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class WeightSource(Protocol):
    """The policy's full weights under Hugging Face names; a tied head is absent. Re-iterable."""

    def metadata(self) -> Sequence[Any]:
        """A ParamMeta of each tensor, in the order of iteration."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, whole tensor)."""


@dataclass(slots=True)
class PublishReport:
    """What became of one version. `dropped` gives each lost replica's reason; seconds by phase."""

    version: int
    updated: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    num_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the block's wall time to `seconds[phase]`, and tell the log that it begins."""
        log.info("phase", extra={"phase": f"publish: {phase.removesuffix('_s')}", "version": self.version})
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - started


class _Key(NamedTuple):
    """One life of a replica: a restarted one is another."""

    replica_id: str
    started_at: float


class _GroupFailed(Exception):
    """A group could not serve its members; `failed` gives the reason of each that reported one."""

    def __init__(self, failed: dict[str, str]) -> None:
        super().__init__(str(failed))
        self.failed = failed


@dataclass(frozen=True, slots=True)
class _Group:
    generation: int
    members: tuple[Replica, ...]
    communicator: Communicator


class Publisher:
    """Sends versions to the replicas in the registry. Rank 0 of the learner only."""

    def __init__(self, registry: Registry, config: RunConfig, source: WeightSource) -> None:
        self._registry = registry
        self._settings = config.weights
        self._source = source
        token = config.rollout.control_token
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._client = httpx.AsyncClient(headers=headers, timeout=PROBE_S)
        self._snapshot: Snapshot | None = None
        self._version = -1
        self._group: _Group | None = None
        # Numbers grow over restarts of the learner too, without anybody keeping them: seconds, then counting up.
        self._generation = int(time.time())
        self._delivered: dict[_Key, int] = {}  # the registry lags by a heartbeat
        self._excluded: dict[_Key, float] = {}  # until when, monotonic seconds

    async def publish(self, version: int) -> PublishReport:
        """Pack the present weights as `version` and give them to every replica; failures are in the report."""
        report = PublishReport(version)
        with report.timed("pack_s"):
            await asyncio.to_thread(self._pack)
        self._version = version
        await self._deliver(await self._candidates(), report)
        await self._registry.set_version(version)
        return report

    async def catch_up(self) -> PublishReport:
        """Give the version published last to replicas that hold another: newcomers, and those dropped before."""
        report = PublishReport(self._version)
        if self._snapshot is not None:
            stale = [replica for replica in await self._candidates() if self._held_by(replica) != self._version]
            await self._deliver(stale, report)
        return report

    async def close(self) -> None:
        """Leave the group."""
        self._leave()
        await self._client.aclose()

    def _pack(self) -> None:
        if self._snapshot is None:
            specs = [TensorSpec(m.name, _dtype_name(m.dtype), tuple(m.shape)) for m in self._source.metadata()]
            plan = make_plan(specs, bucket_bytes=self._settings.bucket_mb << 20)
            self._snapshot = Snapshot(plan)
        self._snapshot.fill(self._source)

    async def _candidates(self) -> list[Replica]:
        now = time.monotonic()
        return [
            replica
            for replica in await self._registry.replicas()
            if replica.state != "draining" and self._excluded.get(_key(replica), 0.0) <= now
        ]

    def _held_by(self, replica: Replica) -> int:
        return self._delivered.get(_key(replica), replica.version)

    async def _deliver(self, replicas: Sequence[Replica], report: PublishReport) -> None:
        """Serve `replicas`, dropping those that fail, until all that are left hold the version."""
        remaining, strikes = list(replicas), dict.fromkeys((r.replica_id for r in replicas), 0)
        assert self._snapshot is not None
        for _ in range(ATTEMPTS):
            if not remaining:
                return
            try:
                with report.timed("form_s"):
                    group = await self._group_of(remaining)
                with report.timed("prepare_s"):
                    await self._prepare(group)
            except _GroupFailed as failure:
                self._leave()
                for replica_id in failure.failed:
                    strikes[replica_id] += 1
                unreachable = await self._post_all(remaining, "abort", Abort(generation=self._generation), PROBE_S)
                hopeless = {name: why for name, why in failure.failed.items() if strikes[name] >= STRIKES}
                remaining = self._drop(remaining, {**hopeless, **unreachable}, report)
                continue
            with report.timed("commit_s"):
                commit = Commit(generation=group.generation, version=report.version, mode=self._settings.update_mode)
                failed = await self._post_all(group.members, "commit", commit, COMMIT_S)
            updated = self._drop(remaining, failed, report)
            self._delivered.update({_key(replica): report.version for replica in updated})
            report.updated += [replica.replica_id for replica in updated]
            report.num_bytes = self._snapshot.plan.num_bytes
            return
        self._drop(remaining, {replica.replica_id: "no transfer succeeded" for replica in remaining}, report)

    def _drop(self, replicas: Sequence[Replica], reasons: dict[str, str], report: PublishReport) -> list[Replica]:
        """Those without a reason; the others are left alone for a while."""
        for replica in replicas:
            if (reason := reasons.get(replica.replica_id)) is not None:
                log.warning("replica dropped", extra={"replica": replica.replica_id, "reason": reason})
                report.dropped[replica.replica_id] = reason
                self._excluded[_key(replica)] = time.monotonic() + EXCLUDED_S
                self._delivered[_key(replica)] = -1  # unknown: it may have swapped before it failed
        return [replica for replica in replicas if replica.replica_id not in reasons]

    async def _group_of(self, replicas: Sequence[Replica]) -> _Group:
        """The group of exactly these replicas: the present one, or a new generation. Raises _GroupFailed."""
        wanted = {_key(replica) for replica in replicas}
        if self._group is not None and {_key(replica) for replica in self._group.members} == wanted:
            return self._group
        self._leave()
        self._generation += 1
        store = await asyncio.to_thread(open_store, self._settings.host, timeout_s=RENDEZVOUS_S)
        transport = self._transport(replicas)
        base = Join(
            generation=self._generation,
            host=self._settings.host,
            port=store.port,
            rank=0,
            world_size=1 + sum(replica.world_size for replica in replicas),
            transport=transport,
            nccl_id=make_nccl_id() if transport == "nccl" else None,
            rendezvous_s=RENDEZVOUS_S,
            timeout_s=self._settings.timeout_s,
        )
        sender = asyncio.create_task(asyncio.to_thread(join_group, base, device=self._device(transport), store=store))
        rank, calls = 1, []
        for replica in replicas:
            calls.append(self._post(replica, "join", base.model_copy(update={"rank": rank}), RENDEZVOUS_S + PROBE_S))
            rank += replica.world_size
        failed = _reasons(replicas, await asyncio.gather(*calls, return_exceptions=True))
        try:
            communicator = await sender
        except TransferError as error:
            raise _GroupFailed(failed or {replica.replica_id: str(error) for replica in replicas}) from error
        if failed:
            communicator.close()
            raise _GroupFailed(failed)
        self._group = _Group(self._generation, tuple(replicas), communicator)
        return self._group

    async def _prepare(self, group: _Group) -> None:
        """Send the snapshot while every member receives it. Raises _GroupFailed unless all have it, intact."""
        assert self._snapshot is not None
        plan, cancelled = self._snapshot.plan, threading.Event()
        sender = asyncio.create_task(asyncio.to_thread(self._snapshot.send, group.communicator, cancelled))
        message = Prepare(
            generation=group.generation,
            version=self._version,
            names=[spec.name for spec in plan.specs],
            dtypes=[spec.dtype for spec in plan.specs],
            shapes=[list(spec.shape) for spec in plan.specs],
            bucket_bytes=plan.bucket_bytes,
        )
        num_buckets = len(list(plan.buckets())) + 1
        deadline_s = num_buckets * self._settings.timeout_s + PROBE_S
        calls = [asyncio.create_task(self._post(r, "prepare", message, deadline_s)) for r in group.members]
        for call in calls:  # one that refuses will never receive: do not send to it until the deadline
            call.add_done_callback(lambda done: cancelled.set() if done.exception() else None)
        failed = _reasons(group.members, await asyncio.gather(*calls, return_exceptions=True))
        try:
            await sender
        except TransferError as error:
            failed = failed or {replica.replica_id: str(error) for replica in group.members}
        if failed:
            raise _GroupFailed(failed)

    async def _post_all(
        self, replicas: Sequence[Replica], step: str, message: Abort | Commit, timeout_s: float
    ) -> dict[str, str]:
        """Tell all at once; the reasons of those that failed."""
        calls = [self._post(replica, step, message, timeout_s) for replica in replicas]
        return _reasons(replicas, await asyncio.gather(*calls, return_exceptions=True))

    async def _post(
        self, replica: Replica, step: str, message: Join | Prepare | Commit | Abort, timeout_s: float
    ) -> dict[str, Any]:
        """One control call. Raises TransferError with the replica's own words, or why there are none."""
        url = f"{replica.url}/control/weights/{step}"
        try:
            response = await self._client.post(url, json=message.model_dump(), timeout=timeout_s)
        except httpx.HTTPError as error:
            raise TransferError(f"{step}: no answer from {replica.url}: {error!r}") from error
        if not response.is_success:
            raise TransferError(f"{step}: {response.status_code} {response.text[:300]}")
        answer: dict[str, Any] = response.json()
        return answer

    def _leave(self) -> None:
        if self._group is not None:
            self._group.communicator.close()
            self._group = None

    def _transport(self, replicas: Sequence[Replica]) -> str:
        """NCCL between different GPUs; gloo where an end has none, or both share one (NCCL refuses that)."""
        if self._settings.transport != "auto":
            return self._settings.transport
        if not torch.cuda.is_available():
            return "gloo"
        own = f"cuda:{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
        apart = all(replica.device.startswith("cuda") and replica.device != own for replica in replicas)
        return "nccl" if apart else "gloo"

    def _device(self, transport: str) -> torch.device:
        """Where the snapshot must be for this transport."""
        assert self._snapshot is not None
        device = torch.device("cuda", torch.cuda.current_device()) if transport == "nccl" else torch.device("cpu")
        self._snapshot.move(device)
        return device


class Snapshot:
    """One version's bytes, packed as `plan` says. Reused from version to version."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._arena = torch.zeros(plan.num_bytes, dtype=torch.uint8)
        self._digests: torch.Tensor | None = None

    def fill(self, source: WeightSource) -> None:
        """Copy all tensors in. Raises ValueError when they are not the plan's."""
        tensors = iter(source)
        for spec, offset in zip(self.plan.specs, self.plan.offsets, strict=True):
            name, tensor = next(tensors)
            if (name, _dtype_name(tensor.dtype), tuple(tensor.shape)) != (spec.name, spec.dtype, spec.shape):
                raise ValueError(f"expected {spec}, the source yielded {name} {tensor.dtype} {tuple(tensor.shape)}")
            place = self._arena[offset : offset + spec.num_bytes]
            place.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        if next(tensors, None) is not None:
            raise ValueError("the source yielded more tensors than its metadata")
        self._digests = None

    def move(self, device: torch.device) -> None:
        """Have the bytes on `device`; digests depend on it."""
        if self._arena.device != device:
            self._arena, self._digests = self._arena.to(device), None

    def send(self, communicator: Communicator, cancelled: threading.Event) -> None:
        """Broadcast every bucket, then the digests. Raises TransferError; leaves the group when it does."""
        try:
            if self._digests is None:
                digests = [digest(self._arena[start:end]) for start, end in self.plan.buckets()]
                self._digests = torch.tensor(digests, dtype=torch.int64, device=self._arena.device)
            for start, end in self.plan.buckets():
                if cancelled.is_set():
                    raise TransferError("a replica refused")
                communicator.broadcast(self._arena[start:end])
            communicator.broadcast(self._digests)
        except TransferError:
            communicator.close()  # our closed sockets wake every receiver at once
            raise


def _key(replica: Replica) -> _Key:
    return _Key(replica.replica_id, replica.started_at)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _reasons(replicas: Sequence[Replica], results: Sequence[object]) -> dict[str, str]:
    """Replica id -> why its call failed, of those that did. What is no transfer error is a bug, and raised."""
    failed = {}
    for replica, result in zip(replicas, results, strict=True):
        if isinstance(result, TransferError):
            failed[replica.replica_id] = str(result)
        elif isinstance(result, BaseException):
            raise result
    return failed
