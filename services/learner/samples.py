"""Keeps a few dialogues of each update for people to read, beside the training: on a thread, bounded in bytes.

Chosen are as many kinds as there are (right at once, right later, wrong, without an answer, ...), in turn. When the
folder is full, files go where they are densest for their age: recent steps stay close together, old ones far apart.
"""

import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.contracts.config import RunConfig, model_path
from services.contracts.samples import (
    FOLDER,
    SampledAttempt,
    SampledDialogue,
    encode_dialogue,
    step_files,
    write_step,
)
from services.contracts.wire import Task, Trajectory
from services.learner.sampler import TaskSampler

MAX_STEP_BYTES = 4 << 20  # of one file, before compression
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer decodes half a character to
MAX_PENDING = 8  # tokens of one character, and some to spare

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Insight:
    """What the update said of the dialogues that this rank trained on. D dialogues, A action tokens."""

    owned: NDArray[np.int64]  # [D] indices into the batch
    offsets: NDArray[np.int64]  # [D + 1] into the advantages
    advantages: NDArray[np.float32]  # [A]

    def of(self, index: int) -> NDArray[np.float32] | None:
        """Advantages of the actions of dialogue `index` of the batch; None when another rank has it."""
        places = np.flatnonzero(self.owned == index)
        return self.advantages[self.offsets[places[0]] : self.offsets[places[0] + 1]] if len(places) else None


class Samples:
    """Writes below `folder`. count: dialogues of each update; 0: none. max_bytes: of the whole folder.

    task_of: the task of a trajectory. load_tokenizer: called once, on the writing thread.
    """

    def __init__(
        self,
        folder: Path,
        *,
        count: int,
        max_bytes: int,
        task_of: Callable[[Trajectory], Task],
        load_tokenizer: Callable[[], Any],
    ) -> None:
        self._folder, self._count, self._max_bytes = folder, count, max_bytes
        self._task_of, self._load_tokenizer = task_of, load_tokenizer
        self._tokenizer: Any = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="samples")
        self._writing: Future[None] | None = None

    def forget_after(self, version: int) -> None:
        """The steps after `version` will be done again."""
        for step, path in step_files(self._folder).items():
            if step > version:
                path.unlink()

    def keep(self, step: int, batch: Sequence[Trajectory], insight: Insight | None) -> None:
        """Have some of the batch of update `step` written. While an earlier one still is, this one is left out."""
        if self._count and insight is not None and (self._writing is None or self._writing.done()):
            chosen = choose(batch, [int(i) for i in insight.owned], count=self._count, seed=step)
            picked = [(batch[i], insight.of(i)) for i in chosen]
            self._writing = self._thread.submit(self._write, step, picked)

    def close(self) -> None:
        """Finish writing."""
        self._thread.shutdown(wait=True)

    def _write(self, step: int, picked: Sequence[tuple[Trajectory, NDArray[np.float32] | None]]) -> None:
        try:
            if self._tokenizer is None:
                self._tokenizer = self._load_tokenizer()
            dialogues, lines, size = [], [], 0
            for trajectory, advantages in picked:
                dialogue = sampled(step, self._task_of(trajectory), trajectory, advantages, self._tokenizer)
                line = encode_dialogue(dialogue)
                if size + len(line) <= MAX_STEP_BYTES:
                    dialogues.append(dialogue)
                    lines.append(line)
                    size += len(line)
            write_step(self._folder, step, dialogues, lines)
            thin(self._folder, self._max_bytes)
        except Exception as error:  # noqa: BLE001 - they are for looking at: training goes on without them
            log.warning("dialogues were not kept", extra={"step": step, "error": repr(error)})


def open_samples(config: RunConfig, sampler: TaskSampler) -> Samples:
    """The samples of a run."""

    def load_tokenizer() -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(model_path(config))

    return Samples(
        config.run_dir / FOLDER,
        count=config.learner.dialogues_kept,
        max_bytes=config.learner.dialogues_mb << 20,
        task_of=lambda trajectory: sampler.task(trajectory.task_id, batch=trajectory.batch, min_version=0),
        load_tokenizer=load_tokenizer,
    )


def choose(batch: Sequence[Trajectory], among: Sequence[int], *, count: int, seed: int) -> list[int]:
    """Up to `count` of the indices `among`, one kind after the other; the same for the same seed."""
    kinds: dict[tuple[object, ...], list[int]] = {}
    for i in np.random.default_rng(seed).permutation(np.array(among, dtype=np.int64)):
        trajectory = batch[int(i)]
        last = trajectory.attempts[-1].verdict if trajectory.attempts else None
        kinds.setdefault((last, len(trajectory.attempts) > 1, trajectory.finish_reason), []).append(int(i))
    queues = [kinds[kind] for kind in sorted(kinds, key=str)]
    chosen: list[int] = []
    while len(chosen) < min(count, len(among)):
        chosen += [queue.pop() for queue in queues if queue]
    return chosen[:count]


def sampled(
    step: int, task: Task, trajectory: Trajectory, advantages: NDArray[np.float32] | None, tokenizer: Any
) -> SampledDialogue:
    """The dialogue with its texts. advantages: [actions], or None where they are not known."""
    of_tokens = np.full(len(trajectory.token_ids), np.nan)
    if advantages is not None:
        of_tokens[trajectory.action_mask] = advantages
    return SampledDialogue(
        step=step,
        task_id=trajectory.task_id,
        problem=task.problem,
        gold=task.gold,
        max_attempts=trajectory.max_attempts,
        reward=trajectory.reward,
        finish_reason=trajectory.finish_reason.value,
        replica_id=trajectory.replica_id,
        versions=tuple((span.version, span.start, span.end) for span in trajectory.versions),
        attempts=tuple(
            SampledAttempt(
                start=attempt.start,
                end=attempt.end,
                extracted=attempt.extracted,
                verdict=attempt.verdict.value,
                grading_ms=attempt.grading_ms,
            )
            for attempt in trajectory.attempts
        ),
        generate_s=trajectory.timings.generate_s,
        grade_s=trajectory.timings.grade_s,
        total_s=trajectory.timings.total_s,
        tokens=tuple(token_texts(tokenizer, trajectory.token_ids.tolist())),
        logprobs=_rounded(trajectory.logprobs),
        advantages=_rounded(of_tokens),
    )


def token_texts(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """The text of each token, special ones by their names; together they are the text of all.

    A tokenizer may drop the space before the first token it decodes, so each is decoded behind the one before it. A
    character that is split over tokens comes with its last one.
    """

    def text(ids: Sequence[int]) -> str:
        decoded: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return decoded

    texts: list[str] = []
    before: list[int] = []
    pending: list[int] = []
    for token_id in token_ids:
        pending.append(token_id)
        whole = text([*before, *pending])
        if whole.endswith(REPLACEMENT) and len(pending) < MAX_PENDING:
            texts.append("")
            continue
        texts.append(whole[len(text(before)) :] if before else whole)
        before, pending = pending, []
    if pending:
        texts[-1] = text([*before, *pending])[len(text(before)) :]
    return texts


def thin(folder: Path, max_bytes: int) -> None:
    """Delete files until the folder holds no more than `max_bytes`; the first and the newest stay to the end."""
    files = step_files(folder)
    sizes = {step: path.stat().st_size for step, path in files.items()}
    while sum(sizes.values()) > max_bytes and len(sizes) > 1:
        steps = list(sizes)
        inner = range(1, len(steps) - 1)
        spared = {i: (steps[i + 1] - steps[i - 1]) / (steps[-1] - steps[i]) for i in inner}
        victim = steps[min(spared, key=lambda i: spared[i])] if spared else steps[0]
        files[victim].unlink()
        del sizes[victim]


def _rounded(values: NDArray[Any]) -> tuple[float | None, ...]:
    return tuple(round(value, 4) if math.isfinite(value) else None for value in values.tolist())
