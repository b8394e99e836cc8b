"""Task, Attempt, Progress and Trajectory: what crosses Redis, and how it is encoded.

msgpack through msgspec, arrays as raw little-endian bytes, a schema version first in every message.
Nothing here is ever pickled. HTTP bodies are pydantic models and live with their service.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Literal, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

SCHEMA_VERSION = 1

_M = TypeVar("_M", "Task", "Trajectory", "Progress")


class WireError(ValueError):
    """A message that this version of the code cannot read."""


class Verdict(StrEnum):
    """What the grader says of one attempt. A grader that could not answer gives no verdict at all."""

    CORRECT = "correct"
    INCORRECT = "incorrect"
    NO_ANSWER = "no_answer"  # no closed, non-empty box in the attempt
    TIMEOUT = "timeout"  # the answer took too long to compare: not accepted, rewarded like a wrong one
    UNPARSABLE_GOLD = "unparsable_gold"  # the data set is at fault; the task goes to the dead letters


class FinishReason(StrEnum):
    """Why a dialogue ended."""

    SOLVED = "solved"
    ATTEMPTS = "attempts"  # all allowed attempts used and ended by the model itself, none correct
    LENGTH = "length"  # cut off: a budget ended the last attempt, or left no room for those still allowed


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Sampling overrides of one task; None takes the run's setting."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None


class Task(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One dialogue to run: a pure function of (run seed, task_id)."""

    task_id: int  # index in the run, from 0
    batch: int  # the policy update that will train on it
    problem: str  # the question as the user turn shows it
    gold: tuple[str, ...]  # any of these answers is right
    max_attempts: int  # N, told to the model in the first prompt
    seed: int  # sampling seed of the first attempt; attempt k uses seed + k
    min_version: int = 0  # weights older than this may not generate it
    kind: Literal["train", "eval"] = "train"
    sampling: Sampling = Sampling()
    schema: int = SCHEMA_VERSION


class Attempt(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One attempt inside a trajectory: `token_ids[start:end]` are its sampled tokens."""

    start: int
    end: int
    extracted: str | None  # the graded answer, None if there was none
    verdict: Verdict
    grading_ms: float


class VersionSpan(msgspec.Struct, frozen=True, array_like=True):
    """Sampled tokens `token_ids[start:end]` came from weights `version`."""

    version: int
    start: int
    end: int


class Timings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a dialogue's wall time went, in seconds."""

    generate_s: float
    grade_s: float
    total_s: float


class Trajectory(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A finished dialogue as the learner trains on it. L = number of tokens.

    `token_ids` are the ids the engine consumed and sampled; no text was tokenised twice.
    """

    task_id: int
    batch: int
    token_ids: NDArray[np.int32]  # [L]
    action_mask: NDArray[np.bool_]  # [L] True on sampled tokens: these are trained
    logprobs: NDArray[np.float32]  # [L] behaviour log-probability, NaN outside actions
    versions: tuple[VersionSpan, ...]  # cover exactly the action tokens, in order
    attempts: tuple[Attempt, ...]
    max_attempts: int
    reward: float
    finish_reason: FinishReason
    replica_id: str
    timings: Timings
    schema: int = SCHEMA_VERSION

    @property
    def oldest_version(self) -> int:
        """The oldest weights that produced a token of this dialogue."""
        return min(span.version for span in self.versions)

    @property
    def is_solved(self) -> bool:
        """Whether the last attempt was correct (the first correct one ends a dialogue unless verdicts are kept)."""
        return bool(self.attempts) and self.attempts[-1].verdict is Verdict.CORRECT


class Progress(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A dialogue between two attempts, as another replica goes on with it. L = number of tokens.

    Ends with what the model was told after its last attempt: the next token is sampled.
    """

    task_id: int
    token_ids: NDArray[np.int32]  # [L]
    logprobs: NDArray[np.float32]  # [L] behaviour log-probability, NaN outside the attempts
    versions: tuple[VersionSpan, ...]  # cover exactly the attempts' tokens, in order
    attempts: tuple[Attempt, ...]  # at least one
    timings: Timings  # so far
    schema: int = SCHEMA_VERSION

    @property
    def oldest_version(self) -> int | None:
        """The oldest weights that produced a token so far; None while there is no such token."""
        return min((span.version for span in self.versions), default=None)


_ARRAY_DTYPES = ("<i4", "|b1", "<f4")  # the only dtypes that may cross the wire


def _enc_hook(value: object) -> object:
    if isinstance(value, np.ndarray):
        little = value.astype(value.dtype.newbyteorder("<"), copy=False)
        if little.dtype.str not in _ARRAY_DTYPES or little.ndim != 1:
            raise WireError(f"arrays on the wire are 1-d {_ARRAY_DTYPES}, got {little.ndim}-d {little.dtype.str}")
        return (little.dtype.str, np.ascontiguousarray(little).tobytes())
    raise NotImplementedError(f"{type(value).__name__} has no wire encoding")


def _dec_hook(expected: type, value: object) -> object:
    if getattr(expected, "__origin__", expected) is np.ndarray:
        if not (isinstance(value, list | tuple) and len(value) == 2 and value[0] in _ARRAY_DTYPES):
            raise WireError("malformed array: expected [dtype, bytes]")
        return np.frombuffer(value[1], dtype=np.dtype(value[0]))
    raise NotImplementedError(f"{expected} has no wire decoding")


_encoder = msgspec.msgpack.Encoder(enc_hook=_enc_hook)
_task_decoder = msgspec.msgpack.Decoder(Task)
_progress_decoder = msgspec.msgpack.Decoder(Progress, dec_hook=_dec_hook)
_trajectory_decoder = msgspec.msgpack.Decoder(Trajectory, dec_hook=_dec_hook)


class _Header(msgspec.Struct):
    schema: Annotated[int, msgspec.Meta(ge=0)] = 0


_header_decoder = msgspec.msgpack.Decoder(_Header)


def encode(message: Task | Trajectory | Progress) -> bytes:
    """Encode a task, a trajectory or a dialogue's progress. Raises WireError for an array dtype that may not travel."""
    return _encoder.encode(message)


def decode_task(data: bytes) -> Task:
    """Decode a task. Raises WireError when the bytes are not one this version understands."""
    return _decode(_task_decoder, data)


def decode_trajectory(data: bytes) -> Trajectory:
    """Decode a trajectory and check its shape invariants. Raises WireError."""
    trajectory = _decode(_trajectory_decoder, data)
    lengths = {len(trajectory.token_ids), len(trajectory.action_mask), len(trajectory.logprobs)}
    if len(lengths) != 1:
        raise WireError(f"trajectory {trajectory.task_id}: arrays of different lengths {sorted(lengths)}")
    dtypes = (trajectory.token_ids.dtype, trajectory.action_mask.dtype, trajectory.logprobs.dtype)
    if dtypes != (np.dtype("<i4"), np.dtype("bool"), np.dtype("<f4")):
        raise WireError(f"trajectory {trajectory.task_id}: wrong array dtypes {dtypes}")
    if not spans_cover_actions(trajectory.versions, trajectory.action_mask):
        raise WireError(f"trajectory {trajectory.task_id}: version spans do not cover the action tokens")
    return trajectory


def decode_progress(data: bytes) -> Progress:
    """Decode a dialogue's progress and check its shape invariants. Raises WireError."""
    progress = _decode(_progress_decoder, data)
    dtypes = (progress.token_ids.dtype, progress.logprobs.dtype)
    if dtypes != (np.dtype("<i4"), np.dtype("<f4")) or len(progress.token_ids) != len(progress.logprobs):
        raise WireError(f"progress of task {progress.task_id}: wrong arrays")
    sampled = np.zeros(len(progress.token_ids), dtype=bool)
    for attempt in progress.attempts:
        sampled[attempt.start : attempt.end] = True
    if not progress.attempts or not spans_cover_actions(progress.versions, sampled):
        raise WireError(f"progress of task {progress.task_id}: version spans do not cover the attempts")
    return progress


def spans_cover_actions(spans: Sequence[VersionSpan], action_mask: NDArray[np.bool_]) -> bool:
    """Whether the spans are in order, disjoint and cover exactly the True positions of the mask."""
    covered = np.zeros(len(action_mask), dtype=bool)
    position = 0
    for span in spans:
        if not position <= span.start < span.end <= len(action_mask):
            return False
        covered[span.start : span.end] = True
        position = span.end
    return bool(np.array_equal(covered, action_mask))


def _decode(decoder: msgspec.msgpack.Decoder[_M], data: bytes) -> _M:
    try:
        schema = _header_decoder.decode(data).schema
        if schema != SCHEMA_VERSION:
            raise WireError(f"message has schema {schema}, this code reads {SCHEMA_VERSION}: upgrade the older side")
        return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise WireError(f"not a message of this system: {error}") from error
