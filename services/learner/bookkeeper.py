"""Keeps the run's books: what became of every task, so that each is accounted for in the ledger or in the checkpoint.

What is dropped or buried leaves its fate in the ledger; what is trained is noted here. A checkpoint takes both into its
books, and only then does the ledger forget them. When Redis lost writes, what the books settled is deleted from it
again, and what is nowhere is recorded as lost, so that the loop issues other tasks in its place.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from services.contracts.books import (
    DEAD,
    LOST_BY_REDIS,
    LOST_WITH_CHECKPOINT,
    SPARE,
    Books,
    Snapshot,
    is_trained,
    missing,
    trained_in,
)
from services.contracts.ledger import Ledger

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Closing:
    """What a checkpoint of `version` settles."""

    version: int
    books: Books
    entries: list[str]  # trajectories to delete once it is durable
    settled: list[int]  # tasks whose fates the ledger need not keep then
    num_noted: int  # how many of the tasks noted as trained are in `books`


@dataclass(frozen=True)
class Reconciled:
    """What Redis lost while this learner was running."""

    given_up: frozenset[int]  # held tasks whose trajectories are gone: they run again, or others do in their place
    num_lost: int  # tasks that are nowhere any more
    num_unsaved: int  # tasks trained here and in no checkpoint, whose trajectories are gone


class Bookkeeper:
    """books: of the checkpoint that the run goes on from. Methods raise what the ledger raises."""

    def __init__(self, ledger: Ledger, books: Books) -> None:
        self._ledger, self._books = ledger, books
        self._trained: list[tuple[int, str]] = []  # (task, fate), in no checkpoint yet

    def note_trained(self, step: int, task_ids: Iterable[int]) -> None:
        """These tasks are in policy update `step`."""
        self._trained += [(task_id, trained_in(step)) for task_id in task_ids]

    async def begin(self, version: int, next_task: int) -> int:
        """Bring the ledger in line with the checkpoint that the run goes on from. Returns the issue counter."""
        lacks_writes = await self._ledger.may_lack_writes()
        snapshot = await self._ledger.snapshot()
        counter = max(snapshot.next_task, next_task)
        forget = self._settled_among(snapshot)
        gone = _trained_by_the_dead(snapshot)
        # Without a reason for a loss none is recorded: what is missing then is a mistake, and stays visible.
        if lacks_writes or snapshot.durable != version or snapshot.next_task < next_task:
            reason = LOST_WITH_CHECKPOINT if snapshot.durable > version else LOST_BY_REDIS
            gone |= dict.fromkeys(missing(self._books, snapshot, counter), reason)
        gone |= {task_id: DEAD for task_id in gone.keys() & set(snapshot.dead)}
        gone = {task_id: fate for task_id, fate in gone.items() if task_id not in forget}
        if gone:
            log.warning("tasks were lost", extra={"lost": len(gone)})
        await self._ledger.reconcile(counter, version, forget=forget, gone=gone)
        return counter

    async def reconcile(self, version: int, next_task: int, held: Iterable[int]) -> Reconciled:
        """Redis was restarted or emptied under this learner: what it says now counts, but for what is trained.

        version: of the newest checkpoint. held: tasks whose trajectories this process has and has not trained on.
        """
        snapshot = await self._ledger.snapshot()
        counter = max(snapshot.next_task, next_task)
        there = {ref.task_id for ref in snapshot.trajectories.values()}
        unsaved = {task_id: fate for task_id, fate in self._trained if task_id not in there}
        settled = self._settled_among(snapshot)
        lost = dict.fromkeys(missing(self._books, snapshot, counter), LOST_BY_REDIS)
        lost |= {task_id: fate for task_id, fate in _trained_by_the_dead(snapshot).items() if task_id not in settled}
        forget = settled | unsaved.keys()  # a task that is back is not to be run again
        await self._ledger.reconcile(counter, version, forget=forget, gone=lost | unsaved)
        return Reconciled(frozenset(held) - there, len(lost.keys() - unsaved.keys()), len(unsaved))

    async def close(self, version: int) -> Closing:
        """The books as a checkpoint of `version` shall have them; what still runs of its batches is taken back."""
        snapshot = await self._ledger.close_batches(version - 1)
        closed = {entry: ref for entry, ref in snapshot.trajectories.items() if ref.batch < version}
        trained = dict(self._trained)
        others = {ref.task_id: SPARE for ref in closed.values()} | snapshot.settled
        known = self._books.among(others) | trained.keys()
        fates = [*self._trained, *((task_id, fate) for task_id, fate in others.items() if task_id not in known)]
        books = self._books.add(fates)
        return Closing(version, books, list(closed), list(snapshot.settled), len(self._trained))

    async def acknowledge(self, closing: Closing) -> None:
        """Its checkpoint is durable: the ledger may forget what it settles. Updates may have been done meanwhile."""
        self._books = closing.books
        del self._trained[: closing.num_noted]
        await self._ledger.acknowledge(closing.entries, closing.version - 1, closing.settled)

    def _settled_among(self, snapshot: Snapshot) -> set[int]:
        return self._books.among([*(ref.task_id for ref in snapshot.present()), *snapshot.settled])


def _trained_by_the_dead(snapshot: Snapshot) -> dict[int, str]:
    """Tasks that a learner trained on, whose trajectories Redis lost, before it died: nobody has them now."""
    return {task_id: LOST_BY_REDIS for task_id, fate in snapshot.settled.items() if is_trained(fate)}
