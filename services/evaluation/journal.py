"""The finished dialogues of an evaluation, kept as they come: `dialogues.jsonl`; `evaluation.json` says of what.

A run that was interrupted goes on after its last whole line.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from services.contracts.config import ConfigError
from services.evaluation.plan import Ask, Header, differences

HEADER, DIALOGUES = "evaluation.json", "dialogues.jsonl"
CORRECT, INCORRECT = "correct", "incorrect"


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt as the replica told it."""

    text: str
    verdict: str
    extracted: str | None
    num_tokens: int  # sampled


class Dialogue(Ask, frozen=True, kw_only=True):
    """One finished dialogue."""

    question: str
    gold: tuple[str, ...]
    seed: int
    attempts: tuple[Attempt, ...]
    finish_reason: str = ""
    num_tokens: int = 0  # prompt, attempts and feedback
    seconds: float = 0.0
    refused: str = ""  # why the replica could not run it; it counts as not solved

    @property
    def verdicts(self) -> tuple[str, ...]:
        """Of the attempts, in order."""
        return tuple(attempt.verdict for attempt in self.attempts)

    @property
    def is_solved(self) -> bool:
        """By its last attempt: with ground truth the dialogue ends at the first correct one."""
        return self.verdicts[-1:] == (CORRECT,)

    @property
    def num_sampled(self) -> int:
        """Tokens of all attempts."""
        return sum(attempt.num_tokens for attempt in self.attempts)


_decoder = msgspec.json.Decoder(Dialogue)
_encoder = msgspec.json.Encoder()


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Make the folder and be the only one to write there. Raises ConfigError when somebody else is."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise ConfigError(f"--output: {folder}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"--output: another evaluation is writing to {folder}") from error
        yield


class Journal:
    """The folder of one evaluation, open for writing by whoever holds it. Use as a context manager.

    Raises ConfigError when it has another evaluation.
    """

    def __init__(self, folder: Path, header: Header) -> None:
        self._folder, self._header = folder, header

    def __enter__(self) -> Self:
        self._identify()
        self.done = {dialogue.key: dialogue for dialogue in _kept(self._folder, mends=True)}
        self._file = (self._folder / DIALOGUES).open("ab")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, dialogue: Dialogue) -> None:
        """Keep one more. Raises OSError when the disk is full: the dialogues before it are kept."""
        self._file.write(_encoder.encode(dialogue) + b"\n")
        self._file.flush()
        self.done[dialogue.key] = dialogue

    def _identify(self) -> None:
        path = self._folder / HEADER
        if not path.exists():
            write_whole(path, msgspec.json.format(msgspec.json.encode(self._header), indent=1))
            return
        if found := differences(read_header(self._folder), self._header):
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise ConfigError(
                f"--output: {self._folder} holds another evaluation: {found[0]}{more}; choose another --output, "
                f"or repeat that one's command to go on with it"
            )


def write_whole(path: Path, content: bytes) -> None:
    """All of a file or nothing."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    os.replace(partial, path)


def read_header(folder: Path) -> Header:
    """What an evaluation is of. Raises ConfigError."""
    try:
        return msgspec.json.decode((folder / HEADER).read_bytes(), type=Header)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"{folder}: no evaluation there ({HEADER} is missing)") from error
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{folder / HEADER}: not an evaluation of this version: {error}") from error


def read_dialogues(folder: Path) -> list[Dialogue]:
    """What is finished so far. Raises ConfigError."""
    return list(_kept(folder, mends=False))


def _kept(folder: Path, *, mends: bool) -> Iterator[Dialogue]:
    """mends: cut off the line that a killed writer left unfinished."""
    path = folder / DIALOGUES
    if not path.exists():
        return
    with path.open("rb+" if mends else "rb") as file:
        end = 0
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            end += len(line)
            try:
                yield _decoder.decode(line)
            except msgspec.MsgspecError as error:
                raise ConfigError(f"{path}:{number}: not a dialogue of this version: {error}") from error
        if mends:
            file.truncate(end)
