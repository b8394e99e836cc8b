"""A few dialogues of each policy update, kept in the run's folder for people to read.

    runs/NAME/dialogues/step-00000012.jsonl.gz     first line: StepIndex, what is in it; then one SampledDialogue a line

The learner writes them, the console reads them. Which dialogues are kept is the learner's choice (`learner/samples`).
"""

import gzip
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

FOLDER = "dialogues"
COMPRESSION = 1  # a tenth of the time of the default, for a few per cent more bytes


class SampleError(ValueError):
    """A file of sampled dialogues that this version cannot read."""


class SampledAttempt(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt: `tokens[start:end]` are what the model said."""

    start: int
    end: int
    extracted: str | None
    verdict: str
    grading_ms: float


class SampledDialogue(msgspec.Struct, frozen=True, kw_only=True):
    """A dialogue as it was trained on. L = number of tokens; None where a token was not sampled."""

    step: int  # the policy update it is part of; the weights before it are version step - 1
    task_id: int
    problem: str
    gold: tuple[str, ...]
    max_attempts: int
    reward: float
    finish_reason: str
    replica_id: str
    versions: tuple[tuple[int, int, int], ...]  # (weight version, start, end) over the sampled tokens
    attempts: tuple[SampledAttempt, ...]
    generate_s: float
    grade_s: float
    total_s: float
    tokens: tuple[str, ...]  # [L] texts; of a character split over tokens, all of it with the last one
    logprobs: tuple[float | None, ...]  # [L] when sampled
    advantages: tuple[float | None, ...]  # [L]


class SampleSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What a list says of a dialogue."""

    step: int
    task_id: int
    problem: str  # its beginning
    verdicts: tuple[str, ...]  # of the attempts, in order
    max_attempts: int
    reward: float
    finish_reason: str
    replica_id: str
    num_sampled: int  # tokens
    oldest_version: int


class StepIndex(msgspec.Struct, frozen=True, kw_only=True):
    """The first line of a file."""

    step: int
    dialogues: tuple[SampleSummary, ...]


_encoder = msgspec.json.Encoder()
_index_decoder = msgspec.json.Decoder(StepIndex)
_dialogue_decoder = msgspec.json.Decoder(SampledDialogue)
_PROBLEM_CHARS = 240


def summary(dialogue: SampledDialogue) -> SampleSummary:
    """What the index says of it."""
    return SampleSummary(
        step=dialogue.step,
        task_id=dialogue.task_id,
        problem=dialogue.problem[:_PROBLEM_CHARS],
        verdicts=tuple(attempt.verdict for attempt in dialogue.attempts),
        max_attempts=dialogue.max_attempts,
        reward=dialogue.reward,
        finish_reason=dialogue.finish_reason,
        replica_id=dialogue.replica_id,
        num_sampled=sum(attempt.end - attempt.start for attempt in dialogue.attempts),
        oldest_version=min((version for version, _, _ in dialogue.versions), default=dialogue.step - 1),
    )


def step_path(folder: Path, step: int) -> Path:
    """The file of one update."""
    return folder / f"step-{step:08d}.jsonl.gz"


def step_files(folder: Path) -> dict[int, Path]:
    """Update -> its file, in order."""
    return {int(path.name[5:13]): path for path in sorted(folder.glob("step-????????.jsonl.gz"))}


def encode_dialogue(dialogue: SampledDialogue) -> bytes:
    """One line, without its end."""
    return _encoder.encode(dialogue)


def write_step(folder: Path, step: int, dialogues: Sequence[SampledDialogue], lines: Iterable[bytes]) -> Path:
    """Write a whole file at once. lines: of `encode_dialogue`, one for each dialogue. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    index = StepIndex(step=step, dialogues=tuple(map(summary, dialogues)))
    path = step_path(folder, step)
    temporary = path.with_name(f".{path.name}")
    content = b"".join(line + b"\n" for line in [_encoder.encode(index), *lines])
    temporary.write_bytes(gzip.compress(content, COMPRESSION))
    os.replace(temporary, path)
    return path


def read_index(path: Path) -> StepIndex:
    """What is in a file. Raises OSError, SampleError."""
    try:
        with gzip.open(path, "rb") as file:
            return _index_decoder.decode(file.readline())
    except (msgspec.MsgspecError, EOFError, gzip.BadGzipFile) as error:
        raise SampleError(f"{path}: not sampled dialogues of this version: {error}") from error


def read_dialogue(path: Path, task_id: int) -> SampledDialogue | None:
    """One dialogue of a file; None when it is not there. Raises OSError, SampleError."""
    wanted = [i for i, found in enumerate(read_index(path).dialogues) if found.task_id == task_id]
    if not wanted:
        return None
    try:
        with gzip.open(path, "rb") as file:
            for _ in range(wanted[0] + 1):
                file.readline()
            return _dialogue_decoder.decode(file.readline())
    except (msgspec.MsgspecError, EOFError) as error:
        raise SampleError(f"{path}: not sampled dialogues of this version: {error}") from error
