"""Stand-ins for the rollout service's neighbours: real small classes with a script, no patching."""

import asyncio
from collections.abc import Callable, Sequence

from services.contracts.ledger import Claim
from services.contracts.wire import Progress, Sampling, Task, Trajectory, Verdict
from services.grader.client import Grade, GraderUnavailableError
from services.rollout.runner import Completion, GenerationAborted

ABORTED = "aborted"  # in an engine's script: somebody else ends the request


def make_task(task_id: int = 0, *, problem: str = "1+1", gold: tuple[str, ...] = ("2",), attempts: int = 3) -> Task:
    return Task(task_id=task_id, batch=0, problem=problem, gold=gold, max_attempts=attempts, seed=7)


class FakeEngine:
    """Answers the k-th request with the k-th entry of its script, cut off like an engine would.

    The log-probability of an answer's i-th token is -(i + 1). swap_at: new weights arrive before this token of every
    request.
    """

    version = 0

    def __init__(self, script: Sequence[Sequence[int] | str], *, swap_at: int | None = None) -> None:
        self._script, self._swap_at = list(script), swap_at
        self.prompts: list[list[int]] = []
        self.seeds: list[int] = []

    async def sample(
        self,
        token_ids: Sequence[int],
        *,
        max_tokens: int,
        seed: int,
        sampling: Sampling,
        stop_ids: frozenset[int],
        is_last: Callable[[int], bool],
    ) -> Completion:
        entry = self._script[len(self.prompts)]
        self.prompts.append(list(token_ids))
        self.seeds.append(seed)
        if isinstance(entry, str):
            raise GenerationAborted("by the script")
        return await speak(entry[:max_tokens], stop_ids, is_last, swap_at=self._swap_at)


async def speak(
    token_ids: Sequence[int], stop_ids: frozenset[int], is_last: Callable[[int], bool], *, swap_at: int | None = None
) -> Completion:
    """The tokens as an engine would sample them, up to the last."""
    sampled: list[int] = []
    for token in token_ids:
        await asyncio.sleep(0)
        sampled.append(token)
        if is_last(token) or token in stop_ids:
            break
    n = len(sampled)
    swap = n if swap_at is None else min(swap_at, n)
    versions = [(version, start, end) for version, start, end in ((0, 0, swap), (1, swap, n)) if start < end]
    return Completion(sampled, [-float(i + 1) for i in range(n)], versions)


class FakeGrader:
    """Gives its scripted verdicts in turn; None: it cannot be reached."""

    def __init__(self, *verdicts: Verdict | None) -> None:
        self._verdicts = list(verdicts)
        self.responses: list[str] = []

    async def grade(self, response: str, gold: tuple[str, ...]) -> Grade:
        await asyncio.sleep(0)
        self.responses.append(response)
        verdict = self._verdicts.pop(0)
        if verdict is None:
            raise GraderUnavailableError("by the script")
        extracted = None if verdict is Verdict.NO_ANSWER else "3"
        return Grade(verdict, verdict is Verdict.CORRECT, extracted, "exact", elapsed_ms=1.5, cached=False)


class MemoryLedger:
    """The tasks' side of a ledger in memory: leases do not run out by themselves, `expire` makes them."""

    def __init__(self, *tasks: Task, floor: int = 0) -> None:
        self.waiting = [Claim(task, f"{task.task_id + 1}-0", 1) for task in tasks]
        self.leased: dict[str, tuple[str, Claim]] = {}
        self.floor = floor
        self.completed: list[Trajectory] = []
        self.buried: list[tuple[Task, str]] = []
        self.renewals: list[list[str]] = []
        self.num_released = self.num_failed = 0
        self.saved: dict[str, list[Progress]] = {}

    async def open(self) -> None:
        pass

    async def claim(self, consumer: str, version: int, n: int) -> list[Claim]:
        if version < self.floor:
            return []
        claims, self.waiting = self.waiting[:n], self.waiting[n:]
        self.leased.update({claim.entry_id: (consumer, claim) for claim in claims})
        return claims

    async def renew(self, consumer: str, entry_ids: Sequence[str]) -> list[str]:
        self.renewals.append(list(entry_ids))
        return [entry_id for entry_id in entry_ids if self.leased.get(entry_id, ("",))[0] == consumer]

    async def release(self, consumer: str, entry_id: str, *, has_failed: bool) -> bool:
        if self.leased.get(entry_id, ("",))[0] != consumer:
            return False
        self.num_released += 1
        self.num_failed += has_failed
        self.expire(entry_id)
        return True

    async def save(self, consumer: str, entry_id: str, progress: Progress) -> bool:
        self.saved.setdefault(entry_id, []).append(progress)
        return True

    async def complete(self, entry_id: str, trajectory: Trajectory) -> bool:
        if self.leased.pop(entry_id, None) is None:
            return False
        self.completed.append(trajectory)
        return True

    async def bury(self, entry_id: str, task: Task, reason: str) -> bool:
        self.leased.pop(entry_id, None)
        self.buried.append((task, reason))
        return True

    def expire(self, entry_id: str, *, taken_by: str | None = None) -> None:
        """The lease has run out: the task waits again, or another consumer has it."""
        _, claim = self.leased.pop(entry_id)
        if taken_by is None:
            saved = self.saved.get(entry_id)
            self.waiting.append(claim._replace(progress=saved[-1] if saved else None))
        else:
            self.leased[entry_id] = (taken_by, claim)
