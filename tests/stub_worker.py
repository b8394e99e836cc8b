"""A worker process whose `compare` does what the answer says, for tests of the pool."""

import contextlib
import os
import sys
import time
from collections.abc import Callable

from services.contracts.wire import Verdict
from services.grader.equivalence import Comparison, Method
from services.grader.worker_process import main

MIB = 2**20


def compare(answer: str, golds: list[str], *, alarm_s: int) -> Comparison:
    word, *arguments = answer.split()
    if word == "descriptors":
        return Comparison(Verdict.CORRECT, Method.EXACT if len(os.listdir("/proc/self/fd")) <= 6 else Method.NUMERIC)
    if word in ACTIONS:
        ACTIONS[word](*map(float, arguments))
    return Comparison(Verdict.CORRECT if answer in golds else Verdict.INCORRECT, Method.EXACT)


def spin() -> None:
    while True:
        pass


def block(mib: float) -> None:
    """One large block, by a library that swallows the MemoryError."""
    with contextlib.suppress(MemoryError):
        bytearray(int(mib) * MIB)


def grow(mib: float) -> None:
    """The same in small blocks."""
    with contextlib.suppress(MemoryError):
        [bytearray(MIB) for _ in range(int(mib))]


def fail() -> None:
    raise RuntimeError("a bug in the comparison")


def run_out() -> None:
    raise MemoryError


def chatter() -> None:
    print("to standard output")  # noqa: T201
    os.write(1, b"straight to the descriptor\n")


ACTIONS: dict[str, Callable[..., object]] = {
    "sleep": time.sleep, "spin": spin, "block": block, "grow": grow, "bug": fail, "raise": run_out, "print": chatter,
    "exit": lambda *_: os._exit(3),
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(compare=compare))
