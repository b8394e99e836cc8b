"""What the loop needs of the parts it drives: `Trainer`, `Publisher`, `Metrics`."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

from services.contracts.books import Books
from services.contracts.wire import Trajectory


class TrainerLike(Protocol):
    """What the loop needs of `Trainer`."""

    version: int
    next_task: int
    books: Books

    @property
    def ask_tokens(self) -> int:
        """How many tokens are worth an `ask`; 0: none."""

    def ask(self, trajectories: Sequence[Trajectory]) -> None:
        """Do in advance what can be done with a part of the batch that `train` comes to next."""

    def stage(self, trajectories: Sequence[Trajectory], version: int) -> None:
        """Pack the batch that will be trained on from `version`; `train` may be running meanwhile."""

    def train(self, trajectories: Sequence[Trajectory], *, on_actor: Callable[[], None]) -> dict[str, float]:
        """One update; `version` goes up by one, then `on_actor` is called, from when on it may be published."""

    def save(self, next_task: int, books: Books, figures: Mapping[str, float]) -> Future[Path]:
        """Begin a checkpoint; the result is the durable one, or CheckpointError."""


class Report(Protocol):
    """What the loop needs of `PublishReport`."""

    updated: list[str]
    dropped: dict[str, str]
    num_bytes: int
    seconds: dict[str, float]


class PublisherLike(Protocol):
    """What the loop needs of `Publisher`."""

    async def publish(self, version: int, *, packed: asyncio.Event | None = None) -> Report:
        """Give the present weights, under this version, to every replica that can be reached.

        packed: set when the live weights are no longer needed, unless it fails before.
        """

    async def catch_up(self) -> object:
        """Give the weights published last to replicas that have others."""


class MetricsLike(Protocol):
    """What the loop needs of `Metrics`."""

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Record one step."""


class Summary(Protocol):
    """`metrics.summarise`."""

    def __call__(self, trajectories: Sequence[Trajectory], *, version: int) -> dict[str, float]:
        """Figures of a batch."""
