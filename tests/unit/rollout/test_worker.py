"""The claim loop against a ledger in memory: what is claimed ends as one trajectory, a letter, or another's task."""

import asyncio
import contextlib

import pytest
from fakes import MemoryLedger, make_task

from services.contracts.settings import DialogueSection
from services.contracts.wire import Timings, Verdict
from services.grader.client import GraderUnavailableError
from services.rollout.dialogue import Dialogue, Sampled
from services.rollout.runner import GenerationAborted, UnrunnableTask
from services.rollout.worker import Worker

DEADLINE_S = 5.0
FAILURES = {
    "grader": GraderUnavailableError,
    "aborted": GenerationAborted,
    "unrunnable": UnrunnableTask,
    "bug": KeyError,
}


class ScriptedRunner:
    """Runs tasks as their problem says: "ok", "hang", or the name of what goes wrong, once."""

    def __init__(self) -> None:
        self.started: list[int] = []
        self.cancelled: list[int] = []
        self.running = self.most_running = 0
        self.go_on = asyncio.Event()

    async def run(self, task):
        self.started.append(task.task_id)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(0.001)
            if task.problem == "hang":
                await self.go_on.wait()
            is_first = self.started.count(task.task_id) == 1
            if task.problem in FAILURES and (is_first or task.problem == "unrunnable"):
                raise FAILURES[task.problem]("by the script")
            return trajectory_of(task)
        except asyncio.CancelledError:
            self.cancelled.append(task.task_id)
            raise
        finally:
            self.running -= 1


def trajectory_of(task):
    dialogue = Dialogue(task=task, settings=DialogueSection(), max_model_len=99, token_ids=[1, 2])
    attempt = Sampled([5], [-1.0], [(0, 0, 1)], closed_turn=False, hit_length=False)
    dialogue.add_attempt(attempt, verdict=Verdict.CORRECT, extracted="2", grading_ms=1.0)
    return dialogue.trajectory(replica_id="r", timings=Timings(generate_s=0, grade_s=0, total_s=0))


def make_worker(ledger, runner, *, max_in_flight=4, lease_s=60.0, version=0):
    return Worker(ledger, runner, replica_id="r", version=lambda: version, max_in_flight=max_in_flight, lease_s=lease_s)


async def until(condition):
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def working(worker):
    loop = asyncio.create_task(worker.run())
    try:
        yield loop
    finally:
        loop.cancel()
        with contextlib.suppress(asyncio.CancelledError, KeyError):
            await loop


async def test_every_task_becomes_one_trajectory_and_no_more_run_at_once_than_allowed():
    ledger, runner = MemoryLedger(*(make_task(i, problem="ok") for i in range(20))), ScriptedRunner()
    async with working(make_worker(ledger, runner, max_in_flight=3)):
        await until(lambda: len(ledger.completed) == 20)
    assert sorted(t.task_id for t in ledger.completed) == list(range(20))
    assert runner.most_running == 3


async def test_a_replica_with_old_weights_claims_nothing():
    ledger, runner = MemoryLedger(make_task(problem="ok"), floor=2), ScriptedRunner()
    async with working(make_worker(ledger, runner, version=1)):
        await asyncio.sleep(0.15)
    assert runner.started == []


async def test_a_task_that_can_never_run_is_buried_with_its_reason():
    ledger, runner = MemoryLedger(make_task(problem="unrunnable"), make_task(1, problem="ok")), ScriptedRunner()
    async with working(make_worker(ledger, runner)):
        await until(lambda: ledger.completed and ledger.buried)
    assert [(task.task_id, reason) for task, reason in ledger.buried] == [(0, "by the script")]


async def test_a_task_without_a_grader_is_released_and_nothing_is_claimed_for_a_while(monkeypatch):
    monkeypatch.setattr("services.rollout.worker.RELEASE_PAUSE_S", 0.3)
    ledger, runner = MemoryLedger(make_task(problem="grader")), ScriptedRunner()
    async with working(make_worker(ledger, runner)):
        await until(lambda: ledger.num_released == 1)
        await asyncio.sleep(0.1)
        assert runner.started == [0]
        await until(lambda: ledger.completed)
    assert runner.started == [0, 0]


async def test_a_task_whose_generation_was_aborted_is_released():
    ledger, runner = MemoryLedger(make_task(problem="aborted")), ScriptedRunner()
    async with working(make_worker(ledger, runner)):
        await until(lambda: ledger.completed)
    assert ledger.num_released == 1


async def test_leases_are_renewed_while_a_dialogue_runs():
    ledger, runner = MemoryLedger(make_task(problem="hang")), ScriptedRunner()
    async with working(make_worker(ledger, runner, lease_s=0.06)):
        await until(lambda: ledger.renewals.count(["1-0"]) >= 3)
        runner.go_on.set()
        await until(lambda: ledger.completed)


async def test_a_dialogue_whose_lease_went_to_another_is_given_up():
    ledger, runner = MemoryLedger(make_task(problem="hang")), ScriptedRunner()
    async with working(make_worker(ledger, runner, lease_s=0.06)):
        await until(lambda: runner.started)
        ledger.expire("1-0", taken_by="another")
        await until(lambda: runner.cancelled == [0])
    assert ledger.completed == []


async def test_a_lease_that_ran_out_and_came_back_does_not_start_the_dialogue_twice():
    ledger, runner = MemoryLedger(make_task(problem="hang")), ScriptedRunner()
    async with working(make_worker(ledger, runner)):
        await until(lambda: runner.started)
        ledger.expire("1-0")
        await until(lambda: "1-0" in ledger.leased)
        await asyncio.sleep(0.05)
        runner.go_on.set()
        await until(lambda: ledger.completed)
    assert runner.started == [0]


async def test_draining_finishes_what_is_in_flight_and_claims_nothing():
    ledger, runner = MemoryLedger(make_task(problem="hang")), ScriptedRunner()
    worker = make_worker(ledger, runner)
    async with working(worker) as loop:
        await until(lambda: runner.started)
        worker.drain()
        ledger.waiting += MemoryLedger(make_task(1, problem="ok")).waiting
        runner.go_on.set()
        await asyncio.wait_for(loop, DEADLINE_S)
    assert [t.task_id for t in ledger.completed] == [0]
    assert len(ledger.waiting) == 1


async def test_a_bug_ends_the_worker_and_the_dialogues_beside_it():
    ledger = MemoryLedger(make_task(problem="hang"), make_task(1, problem="bug"))
    runner = ScriptedRunner()
    with pytest.raises(KeyError):
        await asyncio.wait_for(make_worker(ledger, runner).run(), DEADLINE_S)
    assert runner.cancelled == [0]
    assert ledger.completed == []
