"""One multi-attempt dialogue over token ids: what may be sampled next, when it is over, and its trajectory. Pure.

Segments, never searches in text, say which tokens are actions. Engine, grader and tokenizer are the caller's.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from services.contracts.settings import DialogueSection
from services.contracts.wire import (
    Attempt,
    FinishReason,
    Progress,
    Task,
    Timings,
    Trajectory,
    Verdict,
    VersionSpan,
    spans_cover_actions,
)


@dataclass(frozen=True, slots=True)
class Sampled:
    """What the engine sampled in one attempt. n = number of tokens."""

    token_ids: Sequence[int]  # [n]
    logprobs: Sequence[float]  # [n] of the sampled tokens, after temperature
    versions: Sequence[tuple[int, int, int]]  # (version, start, end) covering 0..n
    closed_turn: bool  # the model itself ended its turn: the last token is its end-of-turn
    hit_length: bool  # stopped by a budget, neither by a box nor by the end of the turn


@dataclass(slots=True)
class Dialogue:
    """The state of one dialogue. Call `budget`, then `add_attempt`; if `wants_feedback`, `add_feedback`, and again."""

    task: Task
    settings: DialogueSection
    max_model_len: int
    token_ids: list[int]
    reward_of: Callable[[Sequence[Verdict]], float]
    ends_when_solved: bool = True  # false: all attempts are made, so that going on tells the model nothing
    attempts: list[Attempt] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    _spans: list[VersionSpan] = field(default_factory=list)
    _logprobs: dict[int, float] = field(default_factory=dict)
    _num_sampled: int = 0

    @property
    def budget(self) -> int:
        """Tokens that the next attempt may sample: of the attempt, of the dialogue, of the context; 0: none fit."""
        return max(
            0,
            min(
                self.settings.tokens_per_attempt,
                self.settings.tokens_per_dialogue - self._num_sampled,
                self.max_model_len - len(self.token_ids),
            ),
        )

    @property
    def seed(self) -> int:
        """Sampling seed of the next attempt."""
        return (self.task.seed + len(self.attempts)) % 2**31

    @property
    def attempts_left(self) -> int:
        """Attempts after those made."""
        return self.task.max_attempts - len(self.attempts)

    @property
    def reward(self) -> float:
        """Of the attempts so far; of the last alone where verdicts are kept from the model.

        Raises ValueError for one that is no finite number: nothing could be learnt.
        """
        judged = self.attempts if self.ends_when_solved else self.attempts[-1:]
        verdicts = [attempt.verdict for attempt in judged]
        earned = float(self.reward_of(verdicts))
        if not math.isfinite(earned):
            raise ValueError(f"the reward of {[str(verdict) for verdict in verdicts]} is {earned}")
        return earned

    def add_attempt(self, sampled: Sampled, *, verdict: Verdict, extracted: str | None, grading_ms: float) -> None:
        """Take one judged attempt; sets `finish_reason` when it was the last."""
        start = len(self.token_ids)
        for i, logprob in enumerate(sampled.logprobs):
            self._logprobs[start + i] = logprob
        self._spans += [VersionSpan(v, start + s, start + e) for v, s, e in sampled.versions]
        self.token_ids += sampled.token_ids
        self._num_sampled += len(sampled.token_ids)
        self.attempts.append(
            Attempt(start=start, end=len(self.token_ids), extracted=extracted, verdict=verdict, grading_ms=grading_ms)
        )
        if verdict is Verdict.CORRECT and (self.ends_when_solved or self.attempts_left == 0):
            self.finish_reason = FinishReason.SOLVED
        elif sampled.hit_length and (self.attempts_left == 0 or self.budget == 0):
            self.finish_reason = FinishReason.LENGTH
        elif self.attempts_left == 0:
            self.finish_reason = FinishReason.ATTEMPTS

    def add_feedback(self, token_ids: Sequence[int]) -> None:
        """Splice in the feedback (never trained); ends the dialogue if nothing could be sampled after it."""
        room = self.settings.tokens_per_dialogue > self._num_sampled
        if not room or len(self.token_ids) + len(token_ids) >= self.max_model_len:
            self.finish_reason = FinishReason.LENGTH
        else:
            self.token_ids += token_ids

    def progress(self, timings: Timings) -> Progress:
        """All that another replica needs to go on from here: before the first token of an attempt, not the first."""
        assert self.attempts and self.finish_reason is None
        return Progress(
            task_id=self.task.task_id,
            token_ids=np.asarray(self.token_ids, dtype=np.int32),
            logprobs=self._logprob_array(),
            versions=tuple(self._spans),
            attempts=tuple(self.attempts),
            timings=timings,
        )

    def resume(self, progress: Progress) -> None:
        """Go on where another replica stopped. What was sampled stays as it is, log-probabilities and versions too."""
        self.token_ids = progress.token_ids.tolist()
        self.attempts = list(progress.attempts)
        self._spans = list(progress.versions)
        positions = [i for attempt in self.attempts for i in range(attempt.start, attempt.end)]
        self._logprobs = dict(zip(positions, progress.logprobs[positions].tolist(), strict=True))
        self._num_sampled = len(positions)

    def trajectory(self, *, replica_id: str, timings: Timings) -> Trajectory:
        """The finished dialogue, as the learner trains on it."""
        assert self.finish_reason is not None, "the dialogue is not over"
        action_mask = np.zeros(len(self.token_ids), dtype=bool)
        action_mask[list(self._logprobs)] = True
        assert spans_cover_actions(self._spans, action_mask), "version spans do not cover the sampled tokens"
        return Trajectory(
            task_id=self.task.task_id,
            batch=self.task.batch,
            token_ids=np.asarray(self.token_ids, dtype=np.int32),
            action_mask=action_mask,
            logprobs=self._logprob_array(),
            versions=tuple(self._spans),
            attempts=tuple(self.attempts),
            max_attempts=self.task.max_attempts,
            reward=self.reward,
            finish_reason=self.finish_reason,
            replica_id=replica_id,
            timings=timings,
        )

    def _logprob_array(self) -> NDArray[np.float32]:
        """[L], NaN where nothing was sampled."""
        logprobs = np.full(len(self.token_ids), np.nan, dtype=np.float32)
        logprobs[list(self._logprobs)] = list(self._logprobs.values())
        return logprobs
