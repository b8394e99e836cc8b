"""The ledger: every task that was issued, and every trajectory that came of one, on Redis streams.

    learner                                         rollout
    issue  -> tasks (group "rollout")       ->      claim, renew, release, save (progress)
    take   <- trajectories (group "learner") <-     complete
    drop, acknowledge       dead letters     <-     bury, or claimed too often

Each step is one Lua script (`lua/*.lua`, whose first lines say what it does and why repeating it does no harm: the
client repeats a command whose reply was lost). So after any crash a task is in exactly one place: waiting, leased,
a trajectory, or settled: `settled` keeps its fate until a durable checkpoint has it (`books`). `live[batch]` counts
tasks and trajectories of a batch that still exist; the learner issues what is missing from it, and that alone replaces
dead, dropped and lost ones.

Nothing grows with the run. Tasks exist for the batches that may run now and no others, so that tasks and trajectories
together are at most (max_staleness + 1) batches and those since the last checkpoint, however far rollout could run
ahead; what is trained, dropped or acknowledged is deleted; dead letters are trimmed.

Beside the tasks is `progress`: a dialogue between two attempts, by the task's entry. Its holder saves it, the next
claim hands it over, and it goes with the entry. A claim counts against `max_deliveries` when nothing came of it: no
result, no saved attempt, and not given back by its holder's own choice.

Times are by the server's clock. A lease is the idle time of a stream entry. Deciding what to issue, what is too old
and when a checkpoint is durable is left to the learner; running the dialogues to rollout.
"""

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple, cast

from redis.asyncio import Redis
from redis.exceptions import NoScriptError, ResponseError

from services.contracts.books import Snapshot, TaskRef
from services.contracts.wire import (
    Progress,
    Task,
    Trajectory,
    decode_progress,
    decode_task,
    decode_trajectory,
    encode,
)

POLL_S = 0.02  # the learner looks for trajectories this often; a blocked connection would cost more than it saves
RESTARTS = 4  # of the server, during one command
TAKE_LIMIT = 256  # trajectories in one reply: some megabytes

_SCRIPTS = (
    "issue", "claim", "renew", "release", "save", "complete", "bury", "take", "drop", "acknowledge", "depth",
    "snapshot", "reconcile",
)  # fmt: skip


_Entries = list[tuple[bytes, dict[bytes, bytes]]]

log = logging.getLogger(__name__)


def run_prefix(run: str) -> str:
    """Prefix of a run's keys. The braces are a cluster hash tag: one slot holds them all, as scripts require."""
    return f"ma:{{{run}}}:"


class Claim(NamedTuple):
    """A task leased to a replica."""

    task: Task
    entry_id: str
    deliveries: int  # 1 the first time; more after claims that came to nothing
    progress: Progress | None = None  # what an earlier holder saved


class Taken(NamedTuple):
    """A trajectory handed to the learner; pending until it is dropped or acknowledged."""

    entry_id: str
    trajectory: Trajectory


class DeadLetter(NamedTuple):
    """A task that will not be run again."""

    task: Task
    reason: str


class Depth(NamedTuple):
    """How much is where."""

    waiting: int  # tasks nobody has claimed
    running: int  # tasks under a lease, expired ones included
    trajectories_ready: int
    trajectories_taken: int  # by the learner, not acknowledged yet
    dead: int


class Ledger:
    """One run's ledger.

    redis: from `store.connect`. lease_s: a claimed task not renewed for this long goes to another replica (found up
    to a quarter of it later). max_deliveries: after so many claims that came to nothing a task is a dead letter.
    Every method may raise redis.exceptions.RedisError, once the client has lost patience with a server that is away,
    and WireError for an entry that another version of the code wrote.
    """

    def __init__(self, redis: Redis, *, run: str, lease_s: float, max_deliveries: int) -> None:
        self._redis = redis
        self._lease_ms = max(1, round(lease_s * 1000))
        self._max_deliveries = max_deliveries
        prefix = run_prefix(run)
        self._tasks = f"{prefix}tasks"
        self._trajectories = f"{prefix}trajectories"
        self._dead = f"{prefix}dead"
        self._progress = f"{prefix}progress"
        self._next_task = f"{prefix}next_task"
        self._version_floor = f"{prefix}version_floor"
        self._live = f"{prefix}live"
        self._settled = f"{prefix}settled"
        self._durable = f"{prefix}durable"
        self._server = f"{prefix}server"
        self._scanned = f"{prefix}scanned"
        folder = resources.files("services.contracts") / "lua"
        prelude = (folder / "prelude.lua").read_text(encoding="utf-8")
        self._scripts = {
            name: redis.register_script(prelude + (folder / f"{name}.lua").read_text(encoding="utf-8"))
            for name in _SCRIPTS
        }
        self._cursors: dict[str, str] = {}  # consumer -> the last entry that take() handed out
        self._held: set[str] = set()  # entries handed out and neither dropped nor acknowledged

    async def open(self) -> None:
        """Make the consumer groups where they are missing, and let `take` begin with what is pending."""
        self._cursors.clear()
        self._held.clear()
        await self._make_groups()

    # The learner issues

    async def next_task(self) -> int:
        """The id of the next task to issue."""
        return int(await self._redis.get(self._next_task) or 0)

    async def issue(self, expected_next: int, tasks: Sequence[Task]) -> int:
        """Append tasks, if the issue counter still equals `expected_next`; else nothing. Returns the counter after.

        The tasks' ids must be expected_next, expected_next + 1, ... (ValueError). Replicas whose weights are older
        than the newest `min_version` issued get nothing from then on. A `min_version` is never above its `batch`.
        """
        if [task.task_id for task in tasks] != list(range(expected_next, expected_next + len(tasks))):
            raise ValueError(f"tasks issued at {expected_next} must be numbered from there without gaps")
        fields = [field for task in tasks for field in (task.batch, task.min_version, encode(task))]
        keys = [self._next_task, self._tasks, self._live, self._version_floor]
        return int(await self._run("issue", keys, expected_next, *fields))

    async def live(self) -> dict[int, int]:
        """Batch -> tasks and trajectories of it that exist. A batch without any may be missing."""
        counts = cast(dict[bytes, bytes], await self._redis.hgetall(self._live))
        return {int(batch): int(count) for batch, count in counts.items()}

    # Rollout works

    async def claim(self, consumer: str, version: int, n: int) -> list[Claim]:
        """Lease up to n tasks to a replica that holds weights `version`: expired leases first, then new tasks.

        Empty when there is nothing to do, or when the version is older than the tasks allow.
        """
        if n < 1:
            return []
        keys = [self._tasks, self._dead, self._live, self._progress, self._settled]
        keys += [self._version_floor, self._scanned]
        found = await self._run("claim", keys, consumer, version, n, self._lease_ms, self._max_deliveries)
        return [
            Claim(
                decode_task(payload),
                entry_id.decode(),
                int(deliveries),
                None if progress is None else decode_progress(progress),
            )
            for entry_id, deliveries, payload, progress in found
        ]

    async def renew(self, consumer: str, entry_ids: Sequence[str]) -> list[str]:
        """Start these leases anew. Returns the ones still ours: the rest expired and went to another, or are done."""
        if not entry_ids:
            return []
        return [entry_id.decode() for entry_id in await self._run("renew", [self._tasks], consumer, *entry_ids)]

    async def release(self, consumer: str, entry_id: str, *, has_failed: bool) -> bool:
        """Give a claimed task back: the next claim gets it, with the progress saved. False: it was no longer ours.

        has_failed: the task could not be run, which counts as a delivery; else the holder merely chose to stop.
        """
        return bool(await self._run("release", [self._tasks, self._scanned], consumer, entry_id, int(has_failed)))

    async def save(self, consumer: str, entry_id: str, progress: Progress) -> bool:
        """Keep a dialogue's progress for whoever claims it next, and renew the lease. False: it was no longer ours."""
        return bool(await self._run("save", [self._tasks, self._progress], consumer, entry_id, encode(progress)))

    async def complete(self, entry_id: str, trajectory: Trajectory) -> bool:
        """Exchange a task for its trajectory in one step. False: its trajectory exists already, nothing was done.

        After a lost connection it may also say False for a trajectory that this very call stored.
        """
        keys = [self._tasks, self._trajectories, self._progress]
        return bool(await self._run("complete", keys, entry_id, trajectory.batch, encode(trajectory)))

    async def bury(self, entry_id: str, task: Task, reason: str) -> bool:
        """Move a task that can never succeed to the dead letters. False: it was done or buried already."""
        log.warning("dead letter", extra={"task_id": task.task_id, "batch": task.batch, "reason": reason})
        keys = [self._tasks, self._dead, self._live, self._progress, self._settled]
        return bool(await self._run("bury", keys, entry_id, reason))

    # The learner takes

    async def take(self, consumer: str, n: int, block_s: float) -> list[Taken]:
        """Up to n trajectories in stream order, each once; waits up to `block_s` seconds for the first.

        They stay pending: after `open()`, in this process or the next, `take` under the same consumer name begins
        with them again. What a server lost in a crash, and so offers a second time, is not handed out twice.
        """
        if n < 1:
            return []
        deadline = time.monotonic() + block_s
        while True:
            cursor = self._cursors.get(consumer, "0")
            found = await self._run("take", [self._trajectories], consumer, cursor, min(n, TAKE_LIMIT))
            taken = [Taken(entry_id.decode(), decode_trajectory(payload)) for entry_id, payload in found]
            fresh = [entry for entry in taken if entry.entry_id not in self._held]
            if fresh:
                self._cursors[consumer] = max(cursor, fresh[-1].entry_id, key=_entry_order)
                self._held.update(entry.entry_id for entry in fresh)
                return fresh
            pause_s = min(POLL_S, deadline - time.monotonic())
            if pause_s <= 0:
                return []
            await asyncio.sleep(pause_s)

    async def drop(self, entry_ids: Iterable[str], reason: str) -> int:
        """Throw away taken trajectories; their batches then lack them. Returns how many existed."""
        ids = list(entry_ids)
        keys = [self._trajectories, self._live, self._settled]
        dropped = int(await self._run("drop", keys, reason, *ids))
        self._held.difference_update(ids)
        return dropped

    async def close_batches(self, through_batch: int) -> Snapshot:
        """Take back the tasks of batches <= through_batch, which have been trained. Returns what there is then.

        No trajectory of these batches can appear after it.
        """
        return await self._snapshot(through_batch + 1)

    async def acknowledge(self, entry_ids: Iterable[str], through_batch: int, settled: Iterable[int] = ()) -> int:
        """Delete what a durable checkpoint contains; forget the counts of batches <= through_batch.

        entry_ids: trajectories. settled: tasks whose fate is in its books. Returns how many trajectories there were.
        """
        ids = list(entry_ids)
        keys = [self._tasks, self._trajectories, self._live, self._settled, self._durable]
        deleted = int(await self._run("acknowledge", keys, through_batch + 1, len(ids), *ids, *settled))
        self._held.difference_update(ids)
        return deleted

    async def may_lack_writes(self) -> bool:
        """Whether the server process is another one than at the last `reconcile`, or was emptied since."""
        information = await self._redis.info("server")
        known = await self._redis.get(self._server)
        return known != str(information["run_id"]).encode()

    async def reconcile(self, counter: int, version: int, *, forget: Iterable[int], gone: Mapping[int, str]) -> None:
        """Mend a ledger that lost writes, or that a dead learner left behind; `take` then begins anew.

        Moves the issue counter forward to `counter` where it is behind; `version` is the learner's checkpoint's.
        forget: tasks settled in its books, wherever they are. gone: the fates of tasks that are nowhere.
        """
        keys = [
            self._tasks, self._trajectories, self._live, self._progress, self._settled, self._next_task, self._durable,
            self._server,
        ]  # fmt: skip
        forgotten = list(forget)
        fates = [word for task_id, fate in gone.items() for word in (task_id, fate)]
        server = str((await self._redis.info("server"))["run_id"])
        await self._run("reconcile", keys, counter, version, server, len(forgotten), *forgotten, *fates)
        await self.open()

    # Anyone looks

    async def depth(self) -> Depth:
        """How many tasks and trajectories are where, at one moment."""
        return Depth(*map(int, await self._run("depth", [self._tasks, self._trajectories, self._dead])))

    async def snapshot(self) -> Snapshot:
        """Every task and its place, at one moment. Reads only; costs the server about 20 us a trajectory."""
        return await self._snapshot(0)

    async def dead_letters(self, limit: int) -> list[DeadLetter]:
        """The newest dead letters, newest first."""
        entries = cast(_Entries, await self._redis.xrevrange(self._dead, count=limit))
        return [DeadLetter(decode_task(fields[b"task"]), fields[b"reason"].decode()) for _, fields in entries]

    async def _snapshot(self, first_open: int) -> Snapshot:
        keys = [
            self._tasks, self._trajectories, self._dead, self._live, self._progress, self._settled, self._next_task,
            self._durable,
        ]  # fmt: skip
        next_task, durable, tasks, found, settled, dead = await self._run("snapshot", keys, first_open)
        refs = [TaskRef(int(task_id), int(batch)) for task_id, batch in zip(tasks[::3], tasks[1::3], strict=True)]
        placed = list(zip(refs, map(int, tasks[2::3]), strict=True))
        trajectories = zip(found[::3], found[1::3], found[2::3], strict=True)
        return Snapshot(
            next_task=int(next_task),
            durable=int(durable),
            queued=[ref for ref, is_running in placed if not is_running],
            running=[ref for ref, is_running in placed if is_running],
            trajectories={entry.decode(): TaskRef(int(task_id), int(batch)) for entry, task_id, batch in trajectories},
            settled={int(task_id): fate.decode() for task_id, fate in zip(settled[::2], settled[1::2], strict=True)},
            dead=[int(task_id) for task_id in dead],
        )

    async def _run(self, script: str, keys: Sequence[str], *args: str | bytes | int) -> Any:
        """Run a script on a server that may come back without scripts, or without data, at any moment."""
        for _ in range(RESTARTS):
            try:
                return await self._scripts[script](keys=keys, args=args)
            except NoScriptError:  # it was restarted between being told the script and running it
                continue
            except ResponseError as error:
                # It lost its data. Everything is issued anew; the groups are all that is missing.
                if "NOGROUP" not in str(error):
                    raise
                await self._make_groups()
        return await self._scripts[script](keys=keys, args=args)

    async def _make_groups(self) -> None:
        for stream, group in ((self._tasks, "rollout"), (self._trajectories, "learner")):
            try:
                await self._redis.xgroup_create(stream, group, id="0", mkstream=True)
            except ResponseError as error:
                if "BUSYGROUP" not in str(error):  # it exists: good
                    raise


def _entry_order(entry_id: str) -> tuple[int, ...]:
    """Stream ids `ms-seq` sort by their numbers, not as text."""
    return tuple(int(part) for part in entry_id.split("-"))
