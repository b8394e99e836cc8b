"""Weights to the replicas: who is in the group, the two phases, and what happens when somebody fails.

Each version is packed once (`snapshot`) and sent from there. A failure never reaches training: the group is left at
once, whoever is to blame is dropped, and the rest are served again. How bytes move is `communicator`'s business.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import httpx
import torch
from prometheus_client import Counter

from services.contracts.config import RunConfig
from services.contracts.registry import Published, Registry, Replica, WeightsFile
from services.contracts.weights.communicator import Communicator, TransferError, join_group, open_store
from services.contracts.weights.protocol import Abort, Commit, Join, Patience, Prepare, Transport, choose_transport
from services.contracts.weights.staging import Received
from services.learner.calls import Calls, GroupFailedError, settle
from services.learner.snapshot import Snapshot, WeightSource
from services.learner.weight_files import WeightFiles

PROBE_S = 5.0  # a replica that does not even answer an abort in this time is hung
STRIKES = 2  # failed transfers after which a replica that does answer is dropped all the same
EXCLUDED_S = 10.0  # a dropped replica that lives on is tried again after this
DIRECT_BYTES = 256 << 20  # of a packed broadcast to vLLM's own engine; it has two such buffers

TRANSFERS = Counter("multiattempt_learner_transfers_total", "Replicas that were to get a version", ["outcome"])
FAILED_GROUPS = Counter("multiattempt_learner_failed_groups_total", "Groups that were given up", ["why"])

log = logging.getLogger(__name__)


@dataclass(slots=True)
class PublishReport:
    """What became of one version. `dropped` gives each lost replica's reason; seconds by phase.

    pack_s passes while the group is formed and sent to: under ZeRO-3 it is the gathering.
    """

    version: int
    updated: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    num_bytes: int = 0
    num_failed_groups: int = 0
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


@dataclass(frozen=True, slots=True)
class _Group:
    generation: int
    members: tuple[Replica, ...]
    communicator: Communicator


class Publisher:
    """Sends versions to the replicas in the registry. Rank 0 of the learner only.

    calls, enter: how replicas are spoken to, and how a group is entered.
    """

    def __init__(
        self,
        registry: Registry,
        config: RunConfig,
        source: WeightSource,
        *,
        calls: Calls | None = None,
        enter: Callable[..., Communicator] = join_group,
    ) -> None:
        self._registry, self._settings, self._source = registry, config.weights, source
        self._patience = Patience(config.weights.timeout_s, config.weights.min_mb_per_s * 1e6)
        self._calls = calls or Calls(_client(), token=config.rollout.control_token)
        self._enter = enter
        self._snapshot: Snapshot | None = None
        self._packing: asyncio.Task[None] | None = None
        self._version = -1
        self._group: _Group | None = None
        # Numbers grow over restarts of the learner too, without anybody keeping them: seconds, then counting up.
        self._generation = int(time.time())
        self._delivered: dict[_Key, int] = {}  # the registry lags by a heartbeat
        self._excluded: dict[_Key, float] = {}  # until when, monotonic seconds
        self._files: WeightFiles | None = None
        self._file: WeightsFile | None = None
        self._writing: asyncio.Task[None] | None = None
        if config.weights.newcomers != "sync":
            own = config.run_dir / "weights"
            self._files = WeightFiles(config.weights.folder if str(config.weights.folder) != "." else own)
        if self._files is not None and config.weights.newcomers == "http":
            self._files.serve(config.weights.host, config.weights.http_port, token=config.rollout.control_token)

    async def publish(self, version: int, *, packed: asyncio.Event | None = None) -> PublishReport:
        """Pack the present weights as `version` and give them to every replica; failures are in the report.

        packed: set as soon as the live weights are no longer needed.
        """
        report = PublishReport(version)
        await self._written()
        if self._snapshot is None:
            # First of all: from now on whoever joins without being seen below waits for weights.
            await self._registry.publish(Published(version=version, fingerprint=""))
            self._snapshot = Snapshot(self._source, bucket_bytes=self._settings.bucket_mb << 20)
        replicas = await self._candidates()
        self._snapshot.arena.move(self._place(self._transport(replicas)))
        self._snapshot.begin()
        self._version = version
        self._packing = asyncio.create_task(self._pack(self._snapshot, report))
        if packed is not None:
            self._packing.add_done_callback(lambda _: packed.set())
        await self._deliver(replicas, report)
        await self._packing
        await self._tell()
        if self._files is not None and (self._file is None or version % self._settings.publish_every == 0):
            self._writing = asyncio.create_task(self._write(self._snapshot, self._files))
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
        await self._written()
        if self._files is not None:
            self._files.close()
        await self._calls.close()

    async def _pack(self, snapshot: Snapshot, report: PublishReport) -> None:
        with report.timed("pack_s"):
            await asyncio.to_thread(snapshot.fill, self._source)

    async def _packed(self) -> None:
        """Until the snapshot is whole. Raises what packing raised."""
        assert self._packing is not None
        await asyncio.shield(self._packing)

    async def _tell(self) -> None:
        assert self._snapshot is not None
        fingerprint = await asyncio.to_thread(self._snapshot.fingerprint)
        await self._registry.publish(Published(version=self._version, fingerprint=fingerprint, file=self._file))

    async def _write(self, snapshot: Snapshot, files: WeightFiles) -> None:
        """Publish the version as a file. A disk that refuses is no reason to end: replicas can do without."""
        received = Received(snapshot.plan, snapshot.fingerprint(), 0.0)
        try:
            self._file = await asyncio.to_thread(files.put, snapshot.arena, received, version=self._version)
        except OSError as error:
            log.warning("weights not written", extra={"folder": str(files.folder), "error": str(error)})
        else:
            await self._tell()

    async def _written(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            await writing

    async def _candidates(self) -> list[Replica]:
        now = time.monotonic()
        return [
            replica
            for replica in await self._registry.replicas()
            if replica.state != "draining" and self._excluded.get(_key(replica), 0.0) <= now
        ]

    def _held_by(self, replica: Replica) -> int:
        """Weights that it started with are no version, whatever it calls them: nobody has compared them."""
        return self._delivered.get(_key(replica), replica.version if replica.fingerprint else -1)

    async def _deliver(self, replicas: Sequence[Replica], report: PublishReport) -> None:
        """Serve `replicas`, dropping those that fail, until all that are left hold the version."""
        remaining, strikes = list(replicas), dict.fromkeys((r.replica_id for r in replicas), 0)
        for _ in range(STRIKES * len(replicas) + 1):
            if not remaining:
                return
            try:
                with report.timed("form_s"):
                    group = await self._group_of(remaining)
                with report.timed("prepare_s"):
                    await self._prepare(group)
            except GroupFailedError as failure:
                remaining = await self._after(failure, remaining, strikes, report)
                is_anybodys = not (failure.silent or failure.guilty or failure.is_our_own)
                if is_anybodys and len(remaining) > 1:  # each by itself: then it is clear who fails
                    for replica in remaining:
                        await self._deliver([replica], report)
                    return
                continue
            with report.timed("commit_s"):
                failed = await self._commit(group)
            updated = self._drop(remaining, failed, report)
            self._delivered.update({_key(replica): report.version for replica in updated})
            report.updated += [replica.replica_id for replica in updated]
            TRANSFERS.labels("updated").inc(len(updated))
            report.num_bytes = self._snapshot.plan.num_bytes if self._snapshot else 0
            return
        self._drop(remaining, {replica.replica_id: "no transfer succeeded" for replica in remaining}, report)

    async def _after(
        self, failure: GroupFailedError, replicas: list[Replica], strikes: dict[str, int], report: PublishReport
    ) -> list[Replica]:
        """Give the group up; those that stay."""
        self._leave()
        report.num_failed_groups += 1
        FAILED_GROUPS.labels(failure.why).inc()
        log.warning("group given up", extra={"generation": self._generation, "reason": str(failure)})
        await self._packed()
        asked = [replica for replica in replicas if replica.replica_id not in failure.silent]
        silent = await self._post_all(asked, "abort", Abort(generation=self._generation), PROBE_S)
        blamed = failure.guilty or ({replicas[0].replica_id: str(failure)} if len(replicas) == 1 else {})
        if failure.is_our_own:
            blamed = {}
        for replica_id in blamed:
            strikes[replica_id] += 1
        hopeless = {name: why for name, why in blamed.items() if strikes[name] >= STRIKES}
        return self._drop(replicas, {**hopeless, **silent, **failure.silent}, report)

    def _drop(self, replicas: Sequence[Replica], reasons: dict[str, str], report: PublishReport) -> list[Replica]:
        """Those without a reason; the others are left alone for a while."""
        for replica in replicas:
            if (reason := reasons.get(replica.replica_id)) is not None:
                log.warning("replica dropped", extra={"replica": replica.replica_id, "reason": reason})
                TRANSFERS.labels("dropped").inc()
                report.dropped[replica.replica_id] = reason
                self._excluded[_key(replica)] = time.monotonic() + EXCLUDED_S
                self._delivered[_key(replica)] = -1  # unknown: it may have swapped before it failed
        return [replica for replica in replicas if replica.replica_id not in reasons]

    async def _group_of(self, replicas: Sequence[Replica]) -> _Group:
        """The group of exactly these replicas: the present one, or a new generation. Raises GroupFailedError."""
        wanted = {_key(replica) for replica in replicas}
        if self._group is not None and {_key(replica) for replica in self._group.members} == wanted:
            return self._group
        self._leave()
        self._generation += 1
        transport, rendezvous_s = self._transport(replicas), self._patience.of(0)
        device = self._place(transport)
        assert self._snapshot is not None
        if self._snapshot.arena.device != device:
            await self._packed()
            await asyncio.to_thread(self._snapshot.arena.move, device)
        store = await asyncio.to_thread(open_store, self._settings.host, timeout_s=rendezvous_s)
        base = Join(
            generation=self._generation,
            host=self._settings.host,
            port=store.port,
            rank=0,
            world_size=1 + sum(replica.world_size for replica in replicas),
            transport=transport,
            staging=self._settings.staging,
            nccl_id=_nccl_id() if transport == "nccl" else None,
            direct_bytes=DIRECT_BYTES,
            rendezvous_s=rendezvous_s,
            bucket_s=self._patience.of(self._snapshot.plan.bucket_bytes),
        )
        cancelled, link = threading.Event(), _own_device() if transport == "nccl" else device
        entering = asyncio.to_thread(self._enter, base, device=link, store=store, cancelled=cancelled)
        sender, rank, calls = asyncio.create_task(entering), 1, {}
        for replica in replicas:
            message = base.model_copy(update={"rank": rank})
            calls[replica.replica_id] = self._calls.post(replica, "join", message, rendezvous_s + PROBE_S)
            rank += replica.world_size
        failed, cause = await settle(sender, calls, cancelled=cancelled, grace_s=PROBE_S)
        communicator = None if cause else sender.result()
        if failed or communicator is None:
            if communicator is not None:
                communicator.close()
            raise GroupFailedError(failed, cause=cause)
        self._group = _Group(self._generation, tuple(replicas), communicator)
        return self._group

    async def _prepare(self, group: _Group) -> None:
        """Send the snapshot while every member receives it. Raises GroupFailedError unless all have it, intact."""
        assert self._snapshot is not None
        plan, cancelled = self._snapshot.plan, threading.Event()
        bucket_s = self._patience.of(plan.bucket_bytes)
        deadline_s = self._patience.of(plan.num_bytes) + 2 * bucket_s  # what stalls must run into the bucket's first
        message = Prepare(
            generation=group.generation,
            version=self._version,
            names=[spec.name for spec in plan.specs],
            dtypes=[spec.dtype for spec in plan.specs],
            shapes=[list(spec.shape) for spec in plan.specs],
            bucket_bytes=plan.bucket_bytes,
            deadline_s=deadline_s,
        )
        if self._settings.staging == "direct":
            await self._packed()
            sending = asyncio.sleep(0)
        else:
            # A bucket that is not filled in half the time that replicas wait for one must not become their fault.
            link = group.communicator
            sending = asyncio.to_thread(self._snapshot.send, link, cancelled=cancelled, patience_s=bucket_s / 2)
        sender = asyncio.create_task(sending)
        calls = {r.replica_id: self._calls.post(r, "prepare", message, deadline_s + PROBE_S) for r in group.members}
        failed, cause = await settle(sender, calls, cancelled=cancelled, grace_s=PROBE_S)
        if failed or cause:
            raise GroupFailedError(failed, cause=cause)

    async def _commit(self, group: _Group) -> dict[str, str]:
        """Have every member swap; the reasons of those that did not."""
        assert self._snapshot is not None
        await self._packed()
        fingerprint = await asyncio.to_thread(self._snapshot.fingerprint)
        load_s = self._patience.of(self._snapshot.plan.num_bytes)
        drain_s = self._settings.drain_s if self._settings.update_mode == "wait" else self._patience.of(0)
        message = Commit(
            generation=group.generation,
            version=self._version,
            mode=self._settings.update_mode,
            fingerprint=fingerprint,
            drain_s=drain_s,
            load_s=load_s,
        )
        swapping = self._post_all(group.members, "commit", message, drain_s + load_s + PROBE_S)
        if self._settings.staging != "direct":
            return await swapping
        send = asyncio.to_thread(self._snapshot.send_directly, group.communicator, chunk_bytes=DIRECT_BYTES)
        failed, outcome = await asyncio.gather(swapping, send, return_exceptions=True)
        if isinstance(failed, BaseException):
            raise failed
        if isinstance(outcome, BaseException):
            self._leave()
            if not isinstance(outcome, TransferError):
                raise outcome
        return failed

    async def _post_all(
        self, replicas: Sequence[Replica], step: str, message: Abort | Commit, timeout_s: float
    ) -> dict[str, str]:
        """Tell all at once; the reasons of those that failed."""
        posts = [self._calls.post(replica, step, message, timeout_s) for replica in replicas]
        reasons = {}
        for replica, result in zip(replicas, await asyncio.gather(*posts, return_exceptions=True), strict=True):
            if isinstance(result, TransferError):
                reasons[replica.replica_id] = str(result)
            elif isinstance(result, BaseException):
                raise result
        return reasons

    def _leave(self) -> None:
        if self._group is not None:
            self._group.communicator.close()
            self._group = None

    def _transport(self, replicas: Sequence[Replica]) -> Transport:
        """NCCL between different GPUs; gloo where an end has none, or two ends share one (NCCL refuses that)."""
        if self._settings.transport != "auto":
            return self._settings.transport
        own = f"cuda:{torch.cuda.get_device_properties(_own_device()).uuid}" if torch.cuda.is_available() else "cpu"
        return choose_transport([own, *(replica.device for replica in replicas)])

    def _place(self, transport: Transport) -> torch.device:
        """Where the snapshot is for this transport."""
        return _own_device() if transport == "nccl" and self._settings.staging != "host" else torch.device("cpu")


def _own_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def _nccl_id() -> str:
    from services.contracts.weights.nccl import make_nccl_id

    return make_nccl_id()


def _client() -> httpx.AsyncClient:
    """As many connections as there are replicas: a join answers only once all have joined, and 100 is httpx's limit."""
    return httpx.AsyncClient(timeout=PROBE_S, limits=httpx.Limits(max_connections=None))


def _key(replica: Replica) -> _Key:
    return _Key(replica.replica_id, replica.started_at)
