"""A learner's loop on a real ledger with everything around it faked, and a replica that answers at once."""

import asyncio
import contextlib
import errno
from collections.abc import AsyncIterator, Callable, Container, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from learner_data import make_trajectory
from redis.asyncio import Redis

from services.contracts.books import Books
from services.contracts.config import RunConfig, load
from services.contracts.ledger import Ledger
from services.contracts.problems import Problem
from services.contracts.wire import Trajectory
from services.learner.checkpoint import CheckpointError, Checkpoints, Manifest
from services.learner.loop import Loop
from services.learner.metrics import summarise
from services.learner.sampler import TaskSampler

PROBLEMS = [Problem(f"{i}+{i}", (str(2 * i),)) for i in range(10)]


@dataclass
class Report:
    updated: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    num_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


class MemoryTrainer:
    """Counts instead of learning; a checkpoint is its numbers, and with a folder a manifest there."""

    def __init__(
        self, *, version: int = 0, next_task: int = 0, books: Books | None = None, folder: Path | None = None
    ) -> None:
        self.version, self.next_task, self.books = version, next_task, books or Books()
        self.checkpoints = Checkpoints(folder, keep=2) if folder else None
        if self.checkpoints and (found := self.checkpoints.latest()):
            self.version, self.next_task, self.books = found[1].version, found[1].next_task, found[1].books
        self.batches: list[list[Trajectory]] = []
        self.asked: list[list[int]] = []
        self.staged: list[tuple[int, list[int]]] = []
        self.ask_tokens = 0
        self.after_actor: Callable[[], None] = lambda: None  # what the critic's steps would be, in a thread
        self.saved: list[tuple[int, int]] = []
        self.full_disk = 0  # how many saves still fail

    def ask(self, trajectories: Sequence[Trajectory]) -> None:
        self.asked.append([trajectory.task_id for trajectory in trajectories])

    def stage(self, trajectories: Sequence[Trajectory], version: int) -> None:
        self.staged.append((version, [trajectory.task_id for trajectory in trajectories]))

    def train(
        self, trajectories: Sequence[Trajectory], *, on_actor: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        self.batches.append(list(trajectories))
        self.version += 1
        on_actor()
        self.after_actor()
        return {"policy_loss": 0.0}

    def save(self, next_task: int, books: Books, figures: Mapping[str, float]) -> Future[Path]:
        if self.full_disk:
            self.full_disk -= 1
            raise CheckpointError(errno.ENOSPC, "disk full")
        if self.checkpoints:
            manifest = Manifest(
                version=self.version,
                next_task=next_task,
                books=books,
                seed=0,
                world_size=1,
                zero_stage=0,
                dtype="float32",
            )
            self.checkpoints.save(manifest, lambda _: None)
        self.saved.append((self.version, next_task))
        self.books = books
        return completed(Path())


def completed(path: Path) -> Future[Path]:
    """What `save` returns when nothing is left to be written."""
    done: Future[Path] = Future()
    done.set_result(path)
    return done


class MemoryPublisher:
    """A fleet that always has the newest weights."""

    def __init__(self) -> None:
        self.version = -1
        self.history: list[int] = []

    async def publish(self, version: int, *, packed: asyncio.Event | None = None) -> Report:
        self.version = version
        self.history.append(version)
        return Report(updated=["rollout-0"])

    async def catch_up(self) -> Report:
        return Report()


class MemoryMetrics:
    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.full_disk = 0  # how many writes still fail

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        if self.full_disk:
            self.full_disk -= 1
            raise OSError(errno.ENOSPC, "disk full")
        self.lines.append((step, dict(figures)))


def make_ledger(redis: Redis) -> Ledger:
    return Ledger(redis, run="loop", lease_s=5, max_deliveries=3)


def make_config(**learner: str) -> RunConfig:
    flags = {"batch_dialogues": "8", "minibatch_dialogues": "8", "checkpoint_every": "2", "take_timeout_s": "20"}
    flags |= learner
    return load(None, [f"--learner.{k}={v}" for k, v in flags.items()] + ["--run.steps=5"], env={})


def make_loop(redis: Redis, config: RunConfig, trainer: MemoryTrainer, publisher: MemoryPublisher) -> Loop:
    return Loop(
        config,
        ledger=make_ledger(redis),
        publisher=publisher,
        trainer=trainer,
        sampler=TaskSampler(
            PROBLEMS,
            seed=0,
            min_attempts=1,
            max_attempts=2,
            samples_per_problem=config.learner.samples_per_problem,
        ),
        metrics=MemoryMetrics(),
        summarise=summarise,
    )


@contextlib.asynccontextmanager
async def rollout(
    redis: Redis,
    publisher: MemoryPublisher,
    *,
    lag: Mapping[int, int] | None = None,
    poisoned: Container[int] = (),
) -> AsyncIterator[None]:
    """A replica that answers every task at once.

    lag: task_id -> how much older its weights pretend to be. poisoned: tasks whose log-probabilities are not numbers.
    """
    ledger = make_ledger(redis)
    await ledger.open()
    lags = dict(lag or {})

    async def serve() -> None:
        while True:
            version = publisher.version
            for claim in await ledger.claim("rollout-0", version, 3):
                old = version - lags.get(claim.task.task_id, 0)
                trajectory = make_trajectory(claim.task.task_id, batch=claim.task.batch, version=old)
                if claim.task.task_id in poisoned:
                    unusable = np.full_like(trajectory.logprobs, np.nan)
                    trajectory = msgspec.structs.replace(trajectory, logprobs=unusable)
                await ledger.complete(claim.entry_id, trajectory)
            await asyncio.sleep(0.005)

    replica = asyncio.create_task(serve())
    try:
        yield
    finally:
        replica.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await replica
