"""Runs one dialogue from its prompt to its trajectory: sample an attempt, have it graded, give feedback, again.

Which dialogues run, and how many at once, is `worker`'s business; the state is `dialogue`'s.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

from prometheus_client import Counter, Gauge, Histogram

from services.contracts.config import RunConfig
from services.contracts.template import Tokenizer, end_of_turn_ids, opening_ids, reply_ids
from services.contracts.tracing import note, span
from services.contracts.wire import Progress, Sampling, Task, Timings, Trajectory, Verdict
from services.rollout.dialogue import Dialogue, Sampled
from services.rollout.environment import Grader, Judgement, ask, load_environment
from services.rollout.events import FedBack, Judged, Listener, Prompted, nobody
from services.rollout.occupancy import Occupancy
from services.rollout.reader import AttemptReader
from services.rollout.text import TokenText

NUM_REPLIES = 256  # tokenised feedbacks kept

RUNNING = Gauge("multiattempt_rollout_dialogues_running", "Dialogues under way, the ledger's and those asked for")
VERSION = Gauge("multiattempt_rollout_weight_version", "Weights that generation uses now: policy updates in them")
STALENESS = Gauge(
    "multiattempt_rollout_staleness_versions", "How many versions ago the oldest dialogue under way may have begun"
)
TOKENS = Counter("multiattempt_rollout_tokens_sampled_total", "Tokens sampled in attempts, whoever asked for them")
ATTEMPTS = Counter("multiattempt_rollout_attempts_total", "Attempts judged", ["verdict", "attempt"])
FIRST_TOKEN_SECONDS = Histogram(
    "multiattempt_rollout_first_token_seconds",
    "From asking the engine for an attempt to its first token",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
GRADING_SECONDS = Histogram(
    "multiattempt_rollout_grading_seconds",
    "From asking for a verdict to having it, waiting and retries included",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)


class UnrunnableTask(ValueError):
    """No replica can ever run this task; says why. It belongs among the dead letters."""


class GenerationAborted(RuntimeError):
    """The engine ended a request that nobody asked it to end (update_mode = "abort"); the task must be run again."""


class EngineDead(RuntimeError):
    """The engine is gone for good: no dialogue of this replica can go on."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What the engine sampled. n = number of tokens."""

    token_ids: Sequence[int]  # [n]
    logprobs: Sequence[float]  # [n] of the sampled tokens, after temperature
    versions: Sequence[tuple[int, int, int]]  # (version, start, end) covering 0..n


class Engine(Protocol):
    """What a dialogue needs of the engine."""

    version: int  # of the weights in use

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
        """Sample a continuation: up to one of `stop_ids`, the first token that `is_last`, or `max_tokens`.

        `is_last` is shown every token once, in order, as it is sampled, and none after the last. Raises
        GenerationAborted, EngineDead. When it is cancelled, so is the request.
        """


class DialogueRunner:
    """Everything that dialogues of one run share."""

    def __init__(
        self, config: RunConfig, *, engine: Engine, grader: Grader, tokenizer: Tokenizer, replica_id: str
    ) -> None:
        self._settings = config.dialogue
        self._environment = load_environment(config.dialogue)
        self._max_model_len = config.model.max_model_len
        self._engine, self._grader, self._tokenizer = engine, grader, tokenizer
        self._replica_id = replica_id
        self._stop_ids = end_of_turn_ids(tokenizer, config.dialogue)
        self._text = TokenText(tokenizer)
        self._occupancy = Occupancy()
        # The same few turns come again and again.
        self._reply_ids = lru_cache(NUM_REPLIES)(
            lambda turn, closed: reply_ids(tokenizer, config.dialogue, turn, turn_closed=closed)
        )
        self._since: dict[object, int] = {}  # dialogues under way -> the oldest weights that they may hold tokens of
        RUNNING.set_function(lambda: self.num_running)
        VERSION.set_function(lambda: engine.version)
        STALENESS.set_function(lambda: engine.version - self.oldest_version)

    @property
    def num_running(self) -> int:
        """Dialogues under way, whoever asked for them."""
        return len(self._since)

    @property
    def num_sampled(self) -> int:
        """Of them, those for which the engine has work; the others wait for verdicts."""
        return self._occupancy.num_sampled

    @property
    def num_attempts(self) -> int:
        """Attempts begun since the start."""
        return self._occupancy.num_begun

    @property
    def oldest_version(self) -> int:
        """The oldest weights that a dialogue under way may hold tokens of; those in use when there is none."""
        return min(self._since.values(), default=self._engine.version)

    async def run(
        self,
        task: Task,
        *,
        resume: Progress | None = None,
        on_progress: Callable[[Progress], None] = lambda _: None,
        listen: Listener = nobody,
        grader: Grader | None = None,
        feedback: Literal["truth", "none"] | None = None,
    ) -> Trajectory:
        """Run the task. Raises UnrunnableTask, GraderUnavailableError, GenerationAborted and engine errors.

        resume: go on from here, unless weights too old for the task began it. on_progress: told after each judged
        attempt that is followed by another. listen: told everything. grader: judges in place of the run's and of
        what the environment has of its own. feedback: in place of the run's `dialogue.feedback`.
        """
        key = object()
        self._since[key] = self._engine.version
        try:
            resume = None if resume is None or _is_stale(resume, task) else resume
            if resume is not None and resume.oldest_version is not None:
                self._since[key] = min(self._since[key], resume.oldest_version)
            ends_when_solved = (feedback or self._settings.feedback) == "truth"
            dialogue = self._open(task, ends_when_solved=ends_when_solved)
            return await self._run(dialogue, resume, on_progress, listen, grader or self._grader)
        finally:
            del self._since[key]

    async def _run(
        self,
        dialogue: Dialogue,
        resume: Progress | None,
        on_progress: Callable[[Progress], None],
        listen: Listener,
        grader: Grader,
    ) -> Trajectory:
        task, started, generate_s, grade_s = dialogue.task, time.monotonic(), 0.0, 0.0
        if resume is not None:
            dialogue.resume(resume)
            generate_s, grade_s = resume.timings.generate_s, resume.timings.grade_s
            started -= resume.timings.total_s
        listen(Prompted(tuple(dialogue.token_ids)))
        while dialogue.finish_reason is None:
            asked = time.monotonic()
            number = len(dialogue.attempts) + 1
            with self._occupancy.sampling(), span(f"attempt {number}", attempt=number) as traced:
                sampled, text = await self._sample(dialogue, listen)
                note(traced, tokens=len(sampled.token_ids), version=self._engine.version)
            answered = time.monotonic()
            judge = self._environment.judge if grader is self._grader else ask
            with self._occupancy.judging(), span(f"grading {number}", attempt=number) as traced:
                judgement = await judge(task, text, grader)
                note(traced, verdict=judgement.verdict.value, grader_ms=judgement.elapsed_ms)
            judged = time.monotonic()
            generate_s, grade_s = generate_s + answered - asked, grade_s + judged - answered
            if judgement.verdict is Verdict.UNPARSABLE_GOLD:
                raise UnrunnableTask(f"the gold answer cannot be parsed: {task.gold!r}")
            dialogue.add_attempt(
                sampled,
                verdict=judgement.verdict,
                extracted=judgement.extracted,
                grading_ms=judgement.elapsed_ms,
            )
            TOKENS.inc(len(sampled.token_ids))
            ATTEMPTS.labels(judgement.verdict.value, len(dialogue.attempts)).inc()
            if grader is self._grader:
                GRADING_SECONDS.observe(judged - answered)
            listen(Judged(dialogue.attempts[-1], text))
            if dialogue.finish_reason is None:
                feedback = self._feedback(dialogue, judgement, closed=sampled.closed_turn)
                dialogue.add_feedback(feedback)
            if dialogue.finish_reason is None:
                listen(FedBack(feedback))
                so_far = Timings(generate_s=generate_s, grade_s=grade_s, total_s=time.monotonic() - started)
                on_progress(dialogue.progress(so_far))
        timings = Timings(generate_s=generate_s, grade_s=grade_s, total_s=time.monotonic() - started)
        return dialogue.trajectory(replica_id=self._replica_id, timings=timings)

    def text(self, token_ids: Sequence[int]) -> str:
        """Text of some tokens, special ones left out, for people."""
        return self._text.decode(list(token_ids))

    def attempt_text(self, trajectory: Trajectory, index: int) -> str:
        """Text of one attempt, for people."""
        attempt = trajectory.attempts[index]
        return self._text.decode(trajectory.token_ids[attempt.start : attempt.end].tolist())

    def _open(self, task: Task, *, ends_when_solved: bool) -> Dialogue:
        ids = opening_ids(self._tokenizer, self._settings, self._environment.prompt(task))
        if len(ids) >= self._max_model_len:
            raise UnrunnableTask(
                f"the prompt has {len(ids)} tokens, the context is {self._max_model_len} (model.max_model_len)"
            )
        return Dialogue(
            task=task,
            settings=self._settings,
            max_model_len=self._max_model_len,
            token_ids=ids,
            reward_of=self._environment.reward,
            ends_when_solved=ends_when_solved,
        )

    def _feedback(self, dialogue: Dialogue, judgement: Judgement, *, closed: bool) -> list[int]:
        if dialogue.ends_when_solved:
            turn = self._environment.feedback(dialogue.task, judgement, dialogue.attempts_left)
        else:
            turn = self._environment.neutral(dialogue.task, dialogue.attempts_left)
        return list(self._reply_ids(turn, closed))

    async def _sample(self, dialogue: Dialogue, listen: Listener) -> tuple[Sampled, str]:
        """One attempt, up to the token that closes a box, the end of the turn, or the budget; and its text."""
        reader = AttemptReader(
            self._text, stop_ids=self._stop_ids, stop_at_box=self._settings.stop_at_box, listen=listen
        )
        asked = time.monotonic()
        completion = await self._engine.sample(
            dialogue.token_ids,
            max_tokens=dialogue.budget,
            seed=dialogue.seed,
            sampling=dialogue.task.sampling,
            stop_ids=self._stop_ids,
            is_last=reader.take,
        )
        if reader.first_token_at is not None:
            FIRST_TOKEN_SECONDS.observe(reader.first_token_at - asked)
        sampled = Sampled(
            completion.token_ids,
            completion.logprobs,
            completion.versions,
            closed_turn=reader.closed_turn,
            hit_length=not reader.closed_turn and not reader.closed_box,
        )
        return sampled, reader.finish(list(completion.token_ids))


def _is_stale(progress: Progress, task: Task) -> bool:
    """Whether the learner would refuse what comes of it: the rule of a claim, for tokens that were sampled before."""
    return progress.oldest_version is not None and progress.oldest_version < task.min_version
