"""The learner's part of each task's trace: its issue, the wait of its trajectory, the training step, and the whole."""

import time
from collections.abc import Sequence

from services.contracts.ledger import Taken
from services.contracts.tracing import entry_time_s, is_traced, record, record_root
from services.contracts.wire import Task, Trajectory


class TaskTraces:
    """Remembers when tasks were issued until they are settled; without tracing it remembers nothing."""

    def __init__(self) -> None:
        self._issued_at: dict[int, float] = {}

    def issued(self, tasks: Sequence[Task], start_s: float) -> None:
        """These were issued in one call, begun at `start_s` (Unix time)."""
        now = time.time()
        for task in tasks:
            if is_traced(task.task_id):
                self._issued_at[task.task_id] = start_s
                record(task.task_id, "issue", start_s, now, batch=task.batch, max_attempts=task.max_attempts)

    def taken(self, taken: Taken) -> None:
        """The learner has its trajectory. How long its dialogue took says how long it waited for a replica."""
        trajectory = taken.trajectory
        task_id, batch = trajectory.task_id, trajectory.batch
        completed_s = entry_time_s(taken.entry_id)
        if task_id in self._issued_at:
            record(
                task_id, "queue: tasks", self._issued_at[task_id], completed_s - trajectory.timings.total_s, batch=batch
            )
        record(task_id, "queue: trajectories", completed_s, time.time(), batch=batch)

    def trained(self, batch: Sequence[Trajectory], step: int, start_s: float) -> None:
        """They are in policy update `step`, begun at `start_s` (Unix time) and done now."""
        for trajectory in batch:
            record(trajectory.task_id, "training step", start_s, time.time(), step=step, dialogues=len(batch))
            self._settled(trajectory, "trained", start_s, step=step)

    def dropped(self, trajectory: Trajectory, reason: str) -> None:
        """It is not trained on."""
        self._settled(trajectory, reason, time.time())

    def _settled(self, trajectory: Trajectory, outcome: str, fallback_s: float, **attributes: int) -> None:
        """fallback_s: the start, when another learner issued it."""
        start_s = self._issued_at.pop(trajectory.task_id, fallback_s)
        if is_traced(trajectory.task_id):
            record_root(
                trajectory.task_id,
                start_s,
                time.time(),
                outcome=outcome,
                reward=trajectory.reward,
                attempts=len(trajectory.attempts),
                finish_reason=trajectory.finish_reason.value,
                replica=trajectory.replica_id,
                **attributes,
            )
