"""The processes that read hostile text: `python -m services.grader.worker_process`, started by `pool`.

This process is a fork server: it imports and warms up once, reads no hostile text, and forks a confined worker whenever
the pool asks, in milliseconds. A worker compares answers, one at a time, `frames` on its socket; the first frame out
says that it has answered a real item. It keeps no clock beyond math-verify's alarm: the pool has it killed.

Standard input is a socket to the pool. Lines in: `fork` (with the worker's socket attached), `kill PID`. Lines out:
`ready`, `forked PID`, `ended PID STATUS` (as `os.waitstatus_to_exitcode`). Workers are killed and reaped here and
nowhere else, so a process id is never that of another process.
"""

import argparse
import gc
import json
import logging
import os
import select
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, BinaryIO

from services.contracts.wire import Verdict
from services.grader import confinement, frames
from services.grader.equivalence import Comparison, compare
from services.grader.explain import explain

REAP_EVERY_S = 0.02  # while a killed worker has not ended yet
Compare = Callable[..., Comparison]  # as equivalence.compare
_PROBE = ("2(x+1)", "2x+2")
_WARM_UP = (  # imports and caches: no first item shall pay for them
    _PROBE,
    (r"\frac{x^2-1}{x-1}", "x+1"),
    (r"\sqrt{8}+\sin(\frac{\pi}{3})", r"2\sqrt{2}+\frac{\sqrt{3}}{2}"),
    (r"(-\infty,1]\cup[2,3)", r"(-\infty, 1) \cup [2,3)"),
    (r"\begin{pmatrix}1\\2x\end{pmatrix}", r"\begin{pmatrix}1\\x+x\end{pmatrix}"),
    ("x=2y+1", "2y-x+1=0"),
    (r"\{1,2,\frac{1}{2}\}", r"\{0.5,2,1\}"),
    (r"e^{i\pi}+\log_2(5)", r"\frac{\ln 5}{\ln 2}-1"),
)


def main(argv: Sequence[str] | None = None, *, compare: Compare = compare) -> int:
    """Fork workers until the pool closes its end."""
    parser = argparse.ArgumentParser(prog="services.grader.worker_process", description=__doc__)
    parser.add_argument("--memory-mb", type=int, required=True)
    parser.add_argument("--timeout-s", type=float, required=True)
    parser.add_argument("--alarm-s", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True, help="process id; this one dies with it")
    arguments = parser.parse_args(argv)
    control = _own_socket()
    confinement.die_with_parent(arguments.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _warm_up(compare)
    server = _ForkServer(control, arguments, compare)
    server.say("ready")
    server.run()
    return 0


def _own_socket() -> socket.socket:
    """Keep the socket to ourselves: whatever a library prints goes to standard error, whatever it reads is empty."""
    control = socket.socket(fileno=os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return control


def _warm_up(compare: Compare) -> None:
    warnings.simplefilter("ignore")
    for name in ("math_verify", "latex2sympy2_extended", "sympy"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    for answer, gold in _WARM_UP:
        compare(answer, [gold], alarm_s=60)
    explain(*_PROBE)
    gc.collect()
    gc.freeze()  # forked workers share what is here: their collector must not touch it


class _ForkServer:
    def __init__(self, control: socket.socket, arguments: argparse.Namespace, compare: Compare) -> None:
        self._control = control
        self._compare = compare
        self._arguments = arguments
        self._living: set[int] = set()
        self._killed: set[int] = set()
        self._sockets: list[int] = []  # that came with `fork` lines not yet read

    def run(self) -> None:
        unread = b""
        while True:
            if select.select([self._control], [], [], REAP_EVERY_S if self._killed else None)[0]:
                received, descriptors, *_ = socket.recv_fds(self._control, 4_096, 4)
                if not received:
                    break
                self._sockets += descriptors
                *lines, unread = (unread + received).split(b"\n")
                for line in lines:
                    self._obey(line.decode())
            self._reap()
        for pid in self._living:
            os.kill(pid, signal.SIGKILL)

    def say(self, line: str) -> None:
        self._control.sendall(line.encode() + b"\n")

    def _obey(self, line: str) -> None:
        match line.split():
            case ["fork"]:
                self._fork(self._sockets.pop(0))
            case ["kill", pid] if int(pid) in self._living:
                os.kill(int(pid), signal.SIGKILL)
                self._living.remove(int(pid))
                self._killed.add(int(pid))

    def _fork(self, descriptor: int) -> None:
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._control.close()
            _run_worker(descriptor, parent, self._arguments, self._compare)
        os.close(descriptor)
        self._living.add(pid)
        self.say(f"forked {pid}")

    def _reap(self) -> None:
        for pid in list(self._killed):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self._killed.remove(pid)
                self.say(f"ended {pid} {os.waitstatus_to_exitcode(status)}")


def _run_worker(descriptor: int, parent: int, arguments: argparse.Namespace, compare: Compare) -> None:
    """What a fork does; never returns into the fork server's code."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        confinement.die_with_parent(parent)
        stream = os.fdopen(descriptor, "r+b", buffering=0)
        watch = confinement.confine(memory_bytes=arguments.memory_mb * 2**20)
        _work(stream, watch, arguments, compare)
        os._exit(0)
    except BaseException:  # noqa: BLE001 - the boundary of the process: nothing may unwind into the fork server
        traceback.print_exc()
    finally:
        os._exit(1)


def _work(stream: BinaryIO, watch: confinement.MemoryWatch, arguments: argparse.Namespace, compare: Compare) -> None:
    """Answer items until the pool closes its end; end after a memory failure, a fresh process is safer."""
    answer, gold = _PROBE
    compare(answer, [gold], alarm_s=arguments.alarm_s)
    if watch.is_exhausted():
        raise MemoryError("the memory limit leaves nothing to compare answers in")
    _send(stream, {"ready": True})
    while (request := _receive(stream)) is not None:
        confinement.allow_cpu(arguments.timeout_s)
        started = time.perf_counter()
        try:
            reply = _answer(request, compare, alarm_s=arguments.alarm_s)
        except MemoryError:
            reply = None
        elapsed_ms = (time.perf_counter() - started) * 1000.0
        if reply is None or watch.is_exhausted():
            _send(stream, {"failure": "memory"})
            return
        _send(stream, reply | {"elapsed_ms": elapsed_ms})


def _answer(request: dict[str, Any], compare: Compare, *, alarm_s: int) -> dict[str, Any]:
    if request["explain"]:
        explanation = explain(request["answer"], request["golds"])
        return {"verdict": Verdict.NO_ANSWER, "method": None, "explanation": asdict(explanation)}
    found = compare(request["answer"], request["golds"], alarm_s=alarm_s)
    return {"verdict": found.verdict, "method": found.method}


def _send(stream: BinaryIO, message: dict[str, Any]) -> None:
    rest = memoryview(frames.encode(message))
    while rest:
        rest = rest[stream.write(rest) :]


def _receive(stream: BinaryIO) -> Any:
    head = _read(stream, frames.LENGTH.size)
    return json.loads(_read(stream, frames.LENGTH.unpack(head)[0])) if head else None


def _read(stream: BinaryIO, num_bytes: int) -> bytes:
    """Exactly so many bytes; fewer only at the end of the stream, as nothing."""
    portions = []
    while num_bytes:
        portions.append(stream.read(num_bytes))
        if not portions[-1]:
            return b""
        num_bytes -= len(portions[-1])
    return b"".join(portions)


if __name__ == "__main__":
    sys.exit(main())
