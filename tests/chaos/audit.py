"""What the ledger and its replicas say of a run in which replicas were killed."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from redis.asyncio import Redis

from services.contracts.ledger import Depth, run_prefix
from services.contracts.wire import Progress, Trajectory, decode_progress


@dataclass
class Killed:
    """What a replica held in the moment it died."""

    in_flight: list[str]  # entries
    saved: dict[int, Progress]  # by task id: those among them that had finished an attempt


@dataclass
class Audit:
    """Holds trajectories against what was saved before the deaths."""

    kills: list[Killed] = field(default_factory=list)

    async def note_death(self, redis: Redis, run: str, replica_id: str) -> Killed:
        """Call when the replica is dead and nobody can have its tasks yet."""
        prefix = run_prefix(run)
        pending = await redis.xpending_range(f"{prefix}tasks", "rollout", "-", "+", 10_000, consumername=replica_id)
        entries = [one["message_id"].decode() for one in pending]
        found = await redis.hmget(f"{prefix}progress", entries) if entries else []
        saved = [decode_progress(data) for data in found if data is not None]
        self.kills.append(Killed(entries, {progress.task_id: progress for progress in saved}))
        return self.kills[-1]

    def report(self, num_tasks: int, trajectories: Sequence[Trajectory], depth: Depth) -> dict[str, int]:
        """The counts; raises AssertionError where a saved attempt did not come back byte for byte."""
        times = Counter(trajectory.task_id for trajectory in trajectories)
        by_task = {trajectory.task_id: trajectory for trajectory in trajectories}
        resumed = {task_id for kill in self.kills for task_id, saved in kill.saved.items() if task_id in by_task}
        for kill in self.kills:
            for task_id, saved in kill.saved.items():
                if task_id in by_task:
                    begins_with(by_task[task_id], saved)
        return {
            "tasks": num_tasks,
            "trajectories": len(trajectories),
            "twice": sum(count - 1 for count in times.values()),
            "lost": num_tasks - len(times) - depth.dead,
            "dead_letters": depth.dead,
            "left_in_ledger": depth.waiting + depth.running,
            "kills": len(self.kills),
            "in_flight_at_kills": sum(len(kill.in_flight) for kill in self.kills),
            "with_saved_attempts": sum(len(kill.saved) for kill in self.kills),
            "resumed": len(resumed),
            "attempts_kept": sum(len(saved.attempts) for kill in self.kills for saved in kill.saved.values()),
        }


def begins_with(trajectory: Trajectory, saved: Progress) -> None:
    """The finished attempts are the ones that were saved: tokens, log-probabilities, versions, verdicts."""
    length, attempts, spans = len(saved.token_ids), len(saved.attempts), len(saved.versions)
    assert trajectory.token_ids[:length].tobytes() == saved.token_ids.tobytes()
    assert trajectory.logprobs[:length].tobytes() == saved.logprobs.tobytes()
    assert trajectory.versions[:spans] == saved.versions
    assert trajectory.attempts[:attempts] == saved.attempts
