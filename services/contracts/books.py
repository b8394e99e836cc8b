"""The books of a run: what became of each task that exists no longer, in ranges, kept with the checkpoint.

The ledger knows every task until a durable checkpoint settles it: `Snapshot` is all of it at one moment. The books
know the settled ones. `examine` holds the two together: each task that was issued is in exactly one state. The books
grow by about one range for each policy update and two for each task that was dropped, not by the task.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

# Why a task was not trained on. Beside these there is `trained_in(step)`.
STALE = "stale"  # its weights were too old
INVALID = "invalid"  # its trajectory would have spoilt the update
SPARE = "spare"  # its batch was full without it
DEAD = "dead letter"  # could not be run: the dead letters say why
LOST_BY_REDIS = "lost by Redis"  # in writes that Redis lost when it died
LOST_WITH_CHECKPOINT = "lost with a checkpoint"  # trained in one that was damaged: the run went on from an older one

QUEUED, RUNNING, WAITING = "queued", "running", "trajectory waiting"
_TRAINED = "trained in step "


def trained_in(step: int) -> str:
    """The fate of a task whose trajectory is in this policy update, counted from 1."""
    return f"{_TRAINED}{step}"


def is_trained(fate: str) -> bool:
    """Whether it is one of `trained_in`."""
    return fate.startswith(_TRAINED)


def step_of(fate: str) -> int:
    """The policy update of one of `trained_in`."""
    return int(fate.removeprefix(_TRAINED))


class TaskRef(NamedTuple):
    """A task that the ledger holds, as a task or as a trajectory."""

    task_id: int
    batch: int


class Snapshot(NamedTuple):
    """All that the ledger knows, at one moment."""

    next_task: int  # issue counter
    durable: int  # the newest checkpoint whose trajectories were acknowledged; 0 before the first
    queued: list[TaskRef]
    running: list[TaskRef]  # under a lease, expired ones included
    trajectories: dict[str, TaskRef]  # by stream entry; those that the learner took and trained on included
    settled: dict[int, str]  # task -> fate, since the last checkpoint
    dead: list[int]  # the dead letters that are kept

    def present(self) -> list[TaskRef]:
        """Tasks and trajectories."""
        return [*self.queued, *self.running, *self.trajectories.values()]


class Books(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settled tasks. Ids are written as ranges: `0-255,260`."""

    trained: dict[int, str] = {}  # policy update, from 1 -> tasks
    dropped: dict[str, str] = {}  # reason -> tasks

    def add(self, fates: Iterable[tuple[int, str]]) -> "Books":
        """With further (task, fate). A task is dropped once for a reason; one trained twice is written twice."""
        added: dict[str, list[int]] = {}
        for task_id, fate in fates:
            added.setdefault(fate, []).append(task_id)
        trained, dropped = dict(self.trained), dict(self.dropped)
        for fate, ids in added.items():
            if is_trained(fate):
                step = step_of(fate)
                trained[step] = format_ranges([*ids, *_ids(trained.get(step, ""))])
            else:
                dropped[fate] = format_ranges({*ids, *_ids(dropped.get(fate, ""))})
        return Books(trained=trained, dropped=dropped)

    def fates(self) -> dict[str, list[range]]:
        """Fate -> tasks. Raises ValueError for ranges that are none."""
        trained = {trained_in(step): parse_ranges(text) for step, text in self.trained.items()}
        return trained | {reason: parse_ranges(text) for reason, text in self.dropped.items()}

    def among(self, ids: Iterable[int]) -> set[int]:
        """Those of the ids that are settled here."""
        wanted = np.unique(np.fromiter(ids, dtype=np.int64))
        ranges = sorted((r.start, r.stop) for found in self.fates().values() for r in found)
        if not len(wanted) or not ranges:
            return set()
        starts, stops = np.array(ranges, dtype=np.int64).T
        before = np.searchsorted(starts, wanted, side="right") - 1
        stops = np.maximum.accumulate(stops)  # ranges that overlap are a mistake, but the audit's to find
        return set(wanted[(before >= 0) & (wanted < stops[before])].tolist())


def format_ranges(ids: Iterable[int]) -> str:
    """`0-3,7` for 0, 1, 2, 3, 7. An id that is there twice stays so."""
    runs: list[list[int]] = []
    for task_id in sorted(ids):
        if runs and task_id == runs[-1][1] + 1:
            runs[-1][1] = task_id
        else:
            runs.append([task_id, task_id])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def parse_ranges(text: str) -> list[range]:
    """The inverse of `format_ranges`. Raises ValueError for what is not of that form."""
    found = []
    for part in text.split(",") if text else []:
        first, dash, last = part.partition("-")
        found.append(range(int(first), int(last if dash else first) + 1))
    return found


def missing(books: Books, snapshot: Snapshot, issued: int) -> list[int]:
    """The tasks below `issued` that neither the books nor the ledger know."""
    known = np.zeros(issued, dtype=bool)
    for ranges in books.fates().values():
        for one in ranges:
            known[one.start : one.stop] = True
    ids = [*(ref.task_id for ref in snapshot.present()), *snapshot.settled]
    known[[task_id for task_id in ids if task_id < issued]] = True
    return [int(task_id) for task_id in np.flatnonzero(~known)]


@dataclass(frozen=True)
class Audit:
    """What the books and the ledger say together."""

    issued: int
    states: dict[str, int]  # how many tasks are in each state; `trained_in` by step
    unaccounted: list[int]  # in no state
    conflicts: dict[int, list[str]]  # in several: task -> states
    leftovers: int  # entries of settled batches that Redis still has to delete

    @property
    def is_clean(self) -> bool:
        """Whether every task is in exactly one state."""
        return not self.unaccounted and not self.conflicts


def examine(books: Books, snapshot: Snapshot, *, version: int, next_task: int) -> Audit:
    """The audit. version, next_task: the checkpoint's that the books are of; 0 without one.

    An entry of a batch before `version` is no state: it can never be trained again and is about to be deleted. What
    became of its task, the books must say.
    """
    issued = max(snapshot.next_task, next_task)
    held = {
        QUEUED: snapshot.queued,
        RUNNING: snapshot.running,
        WAITING: list(snapshot.trajectories.values()),
    }
    states = {name: [ref.task_id for ref in refs if ref.batch >= version] for name, refs in held.items()}
    leftovers = sum(len(refs) for refs in held.values()) - sum(len(ids) for ids in states.values())
    recorded = books.fates()
    for task_id, fate in [*snapshot.settled.items(), *((task_id, DEAD) for task_id in snapshot.dead)]:
        known: Collection[int] = states.setdefault(fate, [])
        if task_id not in known and not any(task_id in one for one in recorded.get(fate, [])):
            states[fate].append(task_id)
    counts, strange = _count(issued, states, recorded)
    offenders = {int(task_id): _states_of(int(task_id), states, recorded) for task_id in np.flatnonzero(counts > 1)}
    offenders |= {task_id: [*_states_of(task_id, states, recorded), "never issued"] for task_id in strange}
    sizes = Counter({name: len(ids) for name, ids in states.items()})
    sizes.update({name: sum(map(len, ranges)) for name, ranges in recorded.items()})
    return Audit(
        issued=issued,
        states=dict(sizes),
        unaccounted=[int(task_id) for task_id in np.flatnonzero(counts == 0)],
        conflicts=offenders,
        leftovers=leftovers,
    )


def _count(
    issued: int, states: Mapping[str, list[int]], recorded: Mapping[str, list[range]]
) -> tuple[NDArray[np.int32], set[int]]:
    """In how many states each issued task is, int32 [issued]; and the ids that were never issued."""
    counts = np.zeros(issued, dtype=np.int32)
    strange: set[int] = set()
    for ids in states.values():
        strange.update(task_id for task_id in ids if not 0 <= task_id < issued)
        np.add.at(counts, [task_id for task_id in ids if 0 <= task_id < issued], 1)
    for ranges in recorded.values():
        for one in ranges:
            counts[one.start : one.stop] += 1
            strange.update(one[max(0, issued - one.start) :])
    return counts, strange


def _states_of(task_id: int, states: Mapping[str, list[int]], recorded: Mapping[str, list[range]]) -> list[str]:
    found = [name for name, ids in states.items() for _ in range(ids.count(task_id))]
    return found + [name for name, ranges in recorded.items() for one in ranges if task_id in one]


def _ids(text: str) -> list[int]:
    return [task_id for one in parse_ranges(text) for task_id in one]
