"""Random lives of a run against a plain model of it: after each step the ledger and the books say what the model says.

The model is dictionaries. A Redis that loses writes is set back to an earlier dump of all its keys.
"""

import copy
import random
from dataclasses import dataclass, field

import pytest
from learner_data import make_trajectory
from redis.asyncio import Redis

from services.contracts.books import (
    DEAD,
    LOST_BY_REDIS,
    QUEUED,
    RUNNING,
    SPARE,
    STALE,
    WAITING,
    Books,
    examine,
    is_trained,
    trained_in,
)
from services.contracts.ledger import Ledger, Taken
from services.contracts.wire import Task
from services.learner.bookkeeper import Bookkeeper

pytestmark = pytest.mark.integration

RUN = "audit"
BATCH = 4
AHEAD = 1  # batches issued ahead
MAX_DELIVERIES = 2
STEPS = 800
REPLICAS = ("a", "b")


@dataclass
class Model:
    """What Redis should hold. A task is in `state` from its issue on; `batch` never changes."""

    state: dict[int, str] = field(default_factory=dict)  # task -> QUEUED, RUNNING, WAITING or its fate
    batch: dict[int, int] = field(default_factory=dict)
    deliveries: dict[int, int] = field(default_factory=dict)
    released: set[int] = field(default_factory=set)  # leases that ran out
    order: list[int] = field(default_factory=list)  # trajectories as they came
    recorded: dict[int, str] = field(default_factory=dict)  # fates that Redis keeps for the next checkpoint

    def there(self, *states: str) -> list[int]:
        return sorted(task_id for task_id, state in self.state.items() if state in states)

    def settle(self, task_id: int, fate: str) -> None:
        self.state[task_id] = self.recorded[task_id] = fate
        self.released.discard(task_id)
        if task_id in self.order:
            self.order.remove(task_id)


class Run:
    """A run of which every step is chance, its model beside it."""

    def __init__(self, redis: Redis, seed: int) -> None:
        self.redis, self.chance = redis, random.Random(seed)
        self.model, self.version, self.durable = Model(), 0, 0
        self.books, self.durable_next = Books(), 0
        self.held: dict[int, Taken] = {}
        self.trained: dict[int, str] = {}  # in no checkpoint yet
        self.dump: tuple[dict[bytes, bytes], Model] | None = None
        self.seen: set[str] = set()  # states and events that came up

    async def start(self) -> None:
        """A learner begins, or begins again, from the checkpoint."""
        self.ledger = Ledger(self.redis, run=RUN, lease_s=600, max_deliveries=MAX_DELIVERIES)
        await self.ledger.open()
        self.keeper, self.held = Bookkeeper(self.ledger, self.books), {}
        await self.keeper.begin(self.durable, self.durable_next)
        self.version, self.trained = self.durable, {}

    async def issue(self) -> None:
        live = await self.ledger.live()
        for batch in range(self.version, self.version + AHEAD + 1):
            first = await self.ledger.next_task()
            number = BATCH - live.get(batch, 0) + self.chance.randint(0, 1)  # now and then a spare one
            if number <= 0:
                continue
            tasks = [
                Task(task_id=i, batch=batch, problem="1+1", gold=("2",), max_attempts=1, seed=i)
                for i in range(first, first + number)
            ]
            assert await self.ledger.issue(first, tasks) == first + number
            for task in tasks:
                self.model.state[task.task_id], self.model.batch[task.task_id] = QUEUED, batch

    async def claim(self) -> None:
        number, model = self.chance.randint(1, 4), self.model
        claims = await self.ledger.claim(self.chance.choice(REPLICAS), 0, number)
        expected = []
        for task_id in sorted(model.released)[:number]:
            if model.deliveries[task_id] >= MAX_DELIVERIES:
                model.settle(task_id, DEAD)
            else:
                expected.append(task_id)
        expected += model.there(QUEUED)[: number - len(expected)]
        for task_id in expected:
            model.state[task_id] = RUNNING
            model.deliveries[task_id] = model.deliveries.get(task_id, 0) + 1
            model.released.discard(task_id)
        assert [claim.task.task_id for claim in claims] == expected

    async def lose_replica(self) -> None:
        """It died with its tasks, and their leases ran out."""
        for task_id in self.model.there(RUNNING):
            if self.chance.random() < 0.5:
                for name in REPLICAS:
                    if await self.ledger.release(name, f"{task_id + 1}-0", has_failed=True):
                        self.model.released.add(task_id)

    async def complete(self) -> None:
        """Of a task that may long have been completed by another, buried or closed."""
        if not self.model.state:
            return
        task_id = self.chance.choice(self.model.there(RUNNING) or list(self.model.state))
        if self.model.state[task_id] == QUEUED:
            return
        was_open = self.model.state[task_id] == RUNNING
        trajectory = make_trajectory(task_id, batch=self.model.batch[task_id])
        for expected in (was_open, False):  # a second completion is never counted
            assert await self.ledger.complete(f"{task_id + 1}-0", trajectory) is expected
        if was_open:
            self.model.state[task_id] = WAITING
            self.model.released.discard(task_id)
            self.model.order.append(task_id)

    async def bury(self) -> None:
        if not (running := self.model.there(RUNNING)):
            return
        task_id = self.chance.choice(running)
        claim = Task(task_id=task_id, batch=0, problem="", gold=(), max_attempts=1, seed=0)
        assert await self.ledger.bury(f"{task_id + 1}-0", claim, "prompt too long")
        self.model.settle(task_id, DEAD)

    async def take(self) -> None:
        taken = await self.ledger.take("learner", self.chance.randint(1, 6), 0)
        ids = [one.trajectory.task_id for one in taken]
        assert ids == [task_id for task_id in self.model.order if task_id in ids]
        self.held |= {one.trajectory.task_id: one for one in taken if one.trajectory.batch >= self.version}

    async def drop(self) -> None:
        if not self.held:
            return
        task_id = self.chance.choice(sorted(self.held))
        assert await self.ledger.drop([self.held.pop(task_id).entry_id], STALE) == 1
        self.model.settle(task_id, STALE)

    async def train(self) -> None:
        ready = sorted(task_id for task_id in self.held if self.model.batch[task_id] == self.version)[:BATCH]
        if len(ready) < BATCH:
            return
        self.version += 1
        self.keeper.note_trained(self.version, ready)
        self.trained |= dict.fromkeys(ready, trained_in(self.version))
        self.held = {i: taken for i, taken in self.held.items() if self.model.batch[i] >= self.version}

    async def checkpoint(self) -> None:
        """The learner may die before the checkpoint is durable, or after, before Redis is told."""
        if self.version == self.durable:
            return
        closing = await self.keeper.close(self.version)
        for task_id in self.model.there(QUEUED, RUNNING):
            if self.model.batch[task_id] < self.version:
                self.model.settle(task_id, SPARE)
        if self.chance.random() < 0.2:
            self.seen.add("died before the checkpoint")
            return await self.kill_learner()
        self.books, self.durable, self.durable_next = closing.books, self.version, await self.ledger.next_task()
        for task_id in self.model.there(WAITING):
            if self.model.batch[task_id] < self.version:
                self.model.settle(task_id, self.trained.get(task_id, SPARE))
        for task_id, fate in self.trained.items():  # those that Redis had lost, too
            self.model.state[task_id] = fate
        self.model.recorded.clear()
        if self.chance.random() < 0.2:
            self.seen.add("died after the checkpoint")
            return await self.start()
        await self.keeper.acknowledge(closing)
        self.trained = {}

    async def kill_learner(self) -> None:
        for task_id, fate in self.model.recorded.items():
            if is_trained(fate):  # only it had them, and Redis had lost their trajectories
                self.model.state[task_id] = self.model.recorded[task_id] = LOST_BY_REDIS
        await self.start()

    async def remember(self) -> None:
        """What a Redis that loses its last writes will be set back to."""
        keys = await self.redis.keys("*")
        self.dump = {key: await self.redis.dump(key) for key in keys}, copy.deepcopy(self.model)

    async def lose_writes(self) -> None:
        if self.dump is None:
            return
        dump, before = self.dump if self.chance.random() < 0.8 else ({}, Model())
        await self.redis.flushall()
        for key, value in dump.items():
            await self.redis.restore(key, 0, value)
        await self.redis.delete("ma:{audit}:server")  # another process has another name
        is_killed = self.chance.random() < 0.3
        if is_killed:
            self.trained, self.version = {}, self.durable
        self.model = self._set_back(copy.deepcopy(before))
        if is_killed:
            # Nobody remembers what was issued after both: these numbers are issued again.
            counter = max(len(before.state), self.durable_next)
            for task_id in [task_id for task_id in self.model.state if task_id >= counter]:
                for forgetful in (self.model.state, self.model.batch, self.model.recorded):
                    forgetful.pop(task_id, None)
            await self.start()
        else:
            found = await self.keeper.reconcile(self.durable, self._issued, self.held)
            assert found.given_up == {i for i in self.held if self.model.state[i] != WAITING}
            self.held = {i: one for i, one in self.held.items() if i not in found.given_up}
        assert not await self.ledger.may_lack_writes()
        self.dump = None  # what it would set back to is older than what has been settled since
        self.seen.add("lost writes")

    def _set_back(self, before: Model) -> Model:
        """What holds after the loss: what the books say, what is trained, else what Redis still has."""
        after = before
        after.batch = dict(self.model.batch)
        settled = {i: state for i, state in self.model.state.items() if i in self.books.among(self.model.state)}
        unsaved = {i: fate for i, fate in self.trained.items() if before.state.get(i) != WAITING}
        for task_id in self.model.state:
            fate = settled.get(task_id) or unsaved.get(task_id)
            if fate is None and is_trained(before.recorded.get(task_id, "")) and task_id not in self.trained:
                fate = LOST_BY_REDIS  # of a learner that died
            if fate is not None or task_id not in before.state:
                after.settle(task_id, fate or LOST_BY_REDIS)
            if task_id in settled:
                after.recorded.pop(task_id, None)
        return after

    @property
    def _issued(self) -> int:
        return len(self.model.state)

    async def check(self) -> None:
        model, snapshot = self.model, await self.ledger.snapshot()
        found = examine(self.books, snapshot, version=self.durable, next_task=self.durable_next)
        assert found.is_clean, (found.unaccounted, found.conflicts)
        assert found.issued == self._issued
        expected: dict[str, int] = {}
        for state in model.state.values():
            expected[state] = expected.get(state, 0) + 1
        self.seen |= expected.keys()
        assert {state: count for state, count in found.states.items() if count} == expected
        present = [*snapshot.queued, *snapshot.running, *snapshot.trajectories.values()]
        open_ids = {ref.task_id for ref in present if ref.batch >= self.durable}
        assert open_ids == set(model.there(QUEUED, RUNNING, WAITING))
        live = await self.ledger.live()
        for batch in range(self.durable, self.version + AHEAD + 1):
            assert live.get(batch, 0) == sum(model.batch[task_id] == batch for task_id in open_ids), batch


@pytest.mark.parametrize("seed", range(8))
async def test_the_audit_says_what_a_model_of_the_run_says(redis: Redis, seed: int) -> None:
    run = Run(redis, seed)
    await run.start()
    often = [run.issue, run.claim, run.complete, run.complete, run.complete, run.take, run.train]
    often += [run.checkpoint if seed % 2 else run.remember]  # much that is trained and not durable, or little
    rare = [
        run.drop,
        run.bury,
        run.lose_replica,
        run.lose_replica,
        run.kill_learner,
        run.remember,
        run.lose_writes,
        run.checkpoint,
    ]
    for _ in range(STEPS):
        step = run.chance.choice(rare if run.chance.random() < 0.15 else often)
        await step()
        try:
            await run.check()
        except AssertionError as error:
            raise AssertionError(f"after {step.__name__}") from error
    assert {WAITING, trained_in(3), DEAD, STALE, "lost writes"} <= run.seen, "the schedule was too tame"
