"""The child that compares answers, one at a time, for `pool`: `python -m services.grader.worker_process`.

`frames` on standard input and output; the first one out says that the child is warm. It keeps no clock of its own
beyond math-verify's alarm: the parent kills it.
"""

import argparse
import ctypes
import gc
import json
import logging
import os
import resource
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any, BinaryIO

from services.grader import frames
from services.grader.equivalence import compare

_PR_SET_PDEATHSIG = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Answer frames until standard input ends. Returns 1 after a memory failure: a fresh process is safer."""
    parser = argparse.ArgumentParser(prog="services.grader.worker_process", description=__doc__)
    parser.add_argument("--memory-mb", type=int, required=True)
    parser.add_argument("--alarm-s", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True, help="process id; the child dies with it")
    arguments = parser.parse_args(argv)
    frames_in, frames_out = _own_pipes()
    _confine(memory_bytes=arguments.memory_mb * 2**20, parent=arguments.parent)
    compare(r"\frac{x^2-1}{x-1}", ["x+1"], alarm_s=60)  # imports and caches: the first item shall not pay for them
    gc.collect()
    gc.freeze()
    _send(frames_out, {"ready": True})
    while (request := _receive(frames_in)) is not None:
        try:
            found = compare(request["answer"], request["golds"], alarm_s=arguments.alarm_s)
        except MemoryError:
            _send(frames_out, {"failure": "memory"})
            return 1
        _send(frames_out, {"verdict": found.verdict, "method": found.method})
    return 0


def _own_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Keep the pipes to ourselves: whatever a library prints goes to standard error, not between the frames."""
    frames_in, frames_out = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    return frames_in, frames_out


def _confine(*, memory_bytes: int, parent: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    if sys.platform == "linux":  # a hung child never sees the end of its input, so ask the kernel
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit("the grader that started this worker is gone")
    warnings.simplefilter("ignore")
    for name in ("math_verify", "latex2sympy2_extended", "sympy"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def _send(stream: BinaryIO, message: dict[str, Any]) -> None:
    stream.write(frames.encode(message))
    stream.flush()


def _receive(stream: BinaryIO) -> Any:
    head = stream.read(frames.LENGTH.size)
    if len(head) < frames.LENGTH.size:
        return None
    return json.loads(stream.read(frames.LENGTH.unpack(head)[0]))


if __name__ == "__main__":
    sys.exit(main())
