"""Which dialogue is task number i: a pure function of the run's seed and i.

A restarted learner therefore issues the very tasks that the lost one would have. When tasks are issued, and for
which policy update, is decided in `loop`.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from services.contracts.problems import Problem
from services.contracts.wire import Task

# The top word of Philox' counter: random streams that never overlap, whatever the index.
STREAM_TASK, STREAM_EPOCH, STREAM_MINIBATCH = 1, 2, 3
_MASK64 = (1 << 64) - 1
SEED_BITS = 48  # leaves room for `seed + attempt`, and survives JSON's doubles


def generator(seed: int, stream: int, index: int) -> np.random.Generator:
    """The random stream number `index` of its kind, the same in every process."""
    key = np.array([seed & _MASK64, index & _MASK64], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, 0, stream], dtype=np.uint64)))


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    """The order of the `size` problems in one pass over the data: int64 permutation of 0..size-1."""
    order = generator(seed, STREAM_EPOCH, epoch).permutation(size)
    order.setflags(write=False)  # the cache hands the same array to everyone
    return order


def group_of(task_id: int, samples_per_problem: int) -> int:
    """The group of a task, and so of its trajectory: those with the same one have the same problem and the same N."""
    return task_id // samples_per_problem


class TaskSampler:
    """Builds tasks. problems: the training side, P of them.

    Tasks come in groups of `samples_per_problem`. Group g takes problem g mod P of pass g div P over a fresh order; its
    members differ in nothing but their sampling seeds, and no seed of one's attempts is a seed of another's.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        *,
        seed: int,
        min_attempts: int,
        max_attempts: int,
        samples_per_problem: int = 1,
    ) -> None:
        if not problems:
            raise ValueError("no training problems")
        self._problems = problems
        self._seed = seed
        self._min_attempts, self._max_attempts = min_attempts, max_attempts
        self._samples_per_problem = samples_per_problem

    def count(self, first: int, missing: int) -> int:
        """How many tasks to issue from number `first` on when `missing` are wanted: up to the end of a group."""
        return missing + -(first + missing) % self._samples_per_problem

    def task(self, task_id: int, *, batch: int, min_version: int) -> Task:
        """Task number `task_id`, to be trained in update `batch` with weights no older than `min_version`."""
        group, member = group_of(task_id, self._samples_per_problem), task_id % self._samples_per_problem
        epoch, position = divmod(group, len(self._problems))
        problem = self._problems[epoch_order(self._seed, epoch, len(self._problems))[position]]
        random = generator(self._seed, STREAM_TASK, group)
        max_attempts = int(random.integers(self._min_attempts, self._max_attempts, endpoint=True))
        return Task(
            task_id=task_id,
            batch=batch,
            problem=problem.question,
            gold=problem.gold,
            max_attempts=max_attempts,
            seed=int(random.integers(1 << SEED_BITS)) + member * max_attempts,
            min_version=min_version,
        )
