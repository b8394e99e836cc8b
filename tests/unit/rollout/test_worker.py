"""The claim loop against a ledger in memory: what is claimed ends as one trajectory, a letter, or another's task."""

import asyncio
import contextlib
import logging

import pytest
from fakes import MemoryLedger, make_task

from services.contracts.settings import DialogueSection
from services.contracts.telemetry import Context
from services.contracts.wire import Timings, Verdict
from services.grader.client import GraderUnavailableError
from services.rollout.dialogue import Dialogue, Sampled
from services.rollout.runner import EngineDead, GenerationAborted, UnrunnableTask
from services.rollout.worker import MAX_FAILURES, Worker

DEADLINE_S = 5.0
ATTEMPT = Sampled([5], [-1.0], [(0, 0, 1)], closed_turn=False, hit_length=False)
NO_TIME = Timings(generate_s=0, grade_s=0, total_s=0)
FAILURES = {
    "grader": GraderUnavailableError,
    "aborted": GenerationAborted,
    "unrunnable": UnrunnableTask,
    "failure": KeyError,
    "dead engine": EngineDead,
}
ONCE = ("grader", "aborted", "failure")


class ScriptedRunner:
    """Runs tasks as their problem says: "ok", "hang", "progress" (then hang), or the name of what goes wrong."""

    def __init__(self) -> None:
        self.started: list[int] = []
        self.cancelled: list[int] = []
        self.resumed: list[int] = []  # number of attempts that a run began with
        self.running = self.most_running = 0
        self.go_on = asyncio.Event()

    async def run(self, task, *, resume, on_progress):
        self.started.append(task.task_id)
        self.resumed.append(len(resume.attempts) if resume else 0)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(0.001)
            if task.problem == "progress":
                for attempts in (1, 2):
                    on_progress(progress_of(task, attempts))
            if task.problem in ("hang", "progress"):
                await self.go_on.wait()
            is_first = self.started.count(task.task_id) == 1
            problem = task.problem.removesuffix(" for ever")
            if problem in FAILURES and (is_first or task.problem not in ONCE):
                raise FAILURES[problem]("by the script")
            return trajectory_of(task)
        except asyncio.CancelledError:
            self.cancelled.append(task.task_id)
            raise
        finally:
            self.running -= 1


def progress_of(task, attempts):
    dialogue = Dialogue(
        task=task, settings=DialogueSection(), max_model_len=99, token_ids=[1, 2], reward_of=lambda _: 1.0
    )
    for _ in range(attempts):
        dialogue.add_attempt(ATTEMPT, verdict=Verdict.INCORRECT, extracted="3", grading_ms=1.0)
        dialogue.add_feedback([7])
    return dialogue.progress(NO_TIME)


def trajectory_of(task):
    dialogue = Dialogue(
        task=task, settings=DialogueSection(), max_model_len=99, token_ids=[1, 2], reward_of=lambda _: 1.0
    )
    dialogue.add_attempt(ATTEMPT, verdict=Verdict.CORRECT, extracted="2", grading_ms=1.0)
    return dialogue.trajectory(replica_id="r", timings=NO_TIME)


def make_worker(ledger, runner, *, max_in_flight=4, lease_s=60.0, version=0):
    return Worker(
        ledger,
        runner,
        replica_id="r",
        version=lambda: version,
        free_places=lambda in_flight, _: max_in_flight - in_flight,
        lease_s=lease_s,
        grader_timeout_s=10.0,
    )


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
        worker.drain(DEADLINE_S)
        ledger.waiting += MemoryLedger(make_task(1, problem="ok")).waiting
        runner.go_on.set()
        await asyncio.wait_for(loop, DEADLINE_S)
    assert [t.task_id for t in ledger.completed] == [0]
    assert len(ledger.waiting) == 1


async def test_what_is_not_done_when_the_grace_period_ends_is_given_back_with_its_progress():
    ledger, runner = MemoryLedger(make_task(problem="progress"), make_task(1, problem="hang")), ScriptedRunner()
    worker = make_worker(ledger, runner)
    async with working(worker) as loop:
        await until(lambda: ledger.saved)
        worker.drain(0.05)
        await asyncio.wait_for(loop, DEADLINE_S)
    assert sorted(runner.cancelled) == [0, 1]
    assert [len(p.attempts) for p in ledger.saved["1-0"]][-1] == 2
    assert sorted((c.task.task_id, c.progress is not None) for c in ledger.waiting) == [(0, True), (1, False)]
    assert (ledger.num_released, ledger.num_failed) == (2, 0)


async def test_a_dialogue_goes_on_from_what_another_replica_saved():
    ledger, first, second = MemoryLedger(make_task(problem="progress")), ScriptedRunner(), ScriptedRunner()
    async with working(make_worker(ledger, first)):
        await until(lambda: ledger.saved)
    second.go_on.set()
    async with working(make_worker(ledger, second)):
        await until(lambda: ledger.completed)
    assert (first.resumed, second.resumed) == ([0], [2])


async def test_saving_is_slower_than_attempts_and_holds_up_none_of_them():
    ledger, runner = SlowLedger(make_task(problem="progress")), ScriptedRunner()
    runner.go_on.set()
    async with working(make_worker(ledger, runner)):
        await until(lambda: ledger.completed)
    assert [len(progress.attempts) for progress in ledger.saved["1-0"]] == [2]  # the first was overtaken


class SlowLedger(MemoryLedger):
    """Saves take a while."""

    async def save(self, consumer, entry_id, progress):
        await asyncio.sleep(0.02)
        return await super().save(consumer, entry_id, progress)


async def test_a_dialogue_that_fails_is_given_back_as_failed_and_the_others_go_on():
    ledger = MemoryLedger(make_task(problem="failure"), make_task(1, problem="ok"))
    async with working(make_worker(ledger, ScriptedRunner())):
        await until(lambda: len(ledger.completed) == 2)
    assert (ledger.num_released, ledger.num_failed) == (1, 1)


async def test_what_is_said_during_a_dialogue_names_its_task(caplog: pytest.LogCaptureFixture):
    class Talking(ScriptedRunner):
        async def run(self, task, **how):
            logging.getLogger("elsewhere").warning("here")
            return await super().run(task, **how)

    context = Context()
    caplog.handler.addFilter(context)
    try:
        ledger = MemoryLedger(*(make_task(i, problem="unrunnable") for i in (3, 4)))
        async with working(make_worker(ledger, Talking())):
            await until(lambda: len(ledger.buried) == 2)
    finally:
        caplog.handler.removeFilter(context)
    assert sorted((record.msg, record.task_id) for record in caplog.records) == [
        ("here", 3),
        ("here", 4),
        ("task buried", 3),
        ("task buried", 4),
    ]


async def test_one_task_that_always_fails_does_not_end_the_worker():
    ledger, runner = MemoryLedger(make_task(problem="failure for ever")), ScriptedRunner()
    async with working(make_worker(ledger, runner)):
        await until(lambda: runner.started.count(0) > 2 * MAX_FAILURES)
    assert ledger.num_failed > MAX_FAILURES


async def test_one_failure_after_another_ends_the_worker_and_the_others_are_given_back():
    bad = [make_task(i, problem="failure for ever") for i in range(1, 1 + MAX_FAILURES)]
    ledger, runner = MemoryLedger(make_task(problem="hang"), *bad), ScriptedRunner()
    with pytest.raises(KeyError):
        await asyncio.wait_for(make_worker(ledger, runner, max_in_flight=9).run(), DEADLINE_S)
    assert runner.cancelled == [0]
    assert ledger.num_failed == ledger.num_released - 1 == MAX_FAILURES
    assert not ledger.leased


async def test_a_dead_engine_ends_the_worker_and_counts_for_all_dialogues_in_flight():
    ledger, runner = MemoryLedger(make_task(problem="hang"), make_task(1, problem="dead engine")), ScriptedRunner()
    with pytest.raises(EngineDead):
        await asyncio.wait_for(make_worker(ledger, runner).run(), DEADLINE_S)
    assert (ledger.num_failed, ledger.leased) == (2, {})


async def test_a_grader_that_judged_others_meanwhile_makes_it_the_tasks_own_failure():
    ledger, runner = MemoryLedger(make_task(problem="ok")), ScriptedRunner()
    async with working(make_worker(ledger, runner)):
        await until(lambda: ledger.completed)
        ledger.waiting += MemoryLedger(make_task(1, problem="grader")).waiting
        await until(lambda: len(ledger.completed) == 2)
    assert ledger.num_failed == 1


async def test_a_grader_that_is_away_is_no_failure_of_the_task():
    ledger, runner = MemoryLedger(make_task(problem="grader")), ScriptedRunner()
    async with working(make_worker(ledger, runner)):
        await until(lambda: ledger.num_released == 1)
    assert ledger.num_failed == 0
