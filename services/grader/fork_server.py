"""The pool's end of `worker_process`: the fork server and the workers it forks, as objects on the event loop."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

from services.grader import frames

START_TIMEOUT_S = 60.0  # the fork server imports sympy and warms up: under a second on an idle core
FORK_TIMEOUT_S = 5.0  # a fork takes a millisecond, its first item fifteen; the machine may be busy
STATUS_TIMEOUT_S = 1.0  # to learn what a worker died of


Kill = Callable[[int, bool], Awaitable[int | None]]  # process id, whether to wait for its exit status -> that


class WorkerError(Exception):
    """The worker is of no more use; `cause` is the label it is counted under."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


class Worker(asyncio.Protocol):
    """One worker process: its socket, one item at a time. Its failures are WorkerError."""

    def __init__(self, kill: "Kill") -> None:
        self.pid = 0
        self.is_lost = False
        self._kill: Kill | None = kill
        self.nudge = asyncio.Event()  # set when there may be work, and when the process has ended
        self._decoder = frames.Decoder()
        self._transport: asyncio.Transport | None = None
        self._reply: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Part of asyncio.Protocol."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Part of asyncio.Protocol."""
        try:
            for message in self._decoder.feed(data):
                if not self._reply.done():
                    self._reply.set_result(message)
        except ValueError:
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        """Part of asyncio.Protocol."""
        self.is_lost = True
        self.nudge.set()
        if not self._reply.done():
            self._reply.set_exception(WorkerError("crash"))
            self._reply.exception()  # nobody may be waiting for it

    async def ready(self) -> None:
        """Wait until it has answered its first item."""
        try:
            async with asyncio.timeout(FORK_TIMEOUT_S):
                await self._reply
        except TimeoutError as error:
            raise WorkerError("start") from error

    async def ask(self, message: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """Send one item and wait for the reply."""
        if self.is_lost or self._transport is None:
            raise WorkerError("crash")
        self._reply = asyncio.get_running_loop().create_future()
        self._transport.write(frames.encode(message))
        try:
            async with asyncio.timeout(timeout_s):
                return await self._reply
        except TimeoutError as error:
            raise WorkerError("deadline") from error

    async def kill(self, *, is_status_wanted: bool = False) -> int | None:
        """SIGKILL, which a stopped or hanging process cannot resist. Gives the exit status when it is wanted."""
        self.close()
        kill, self._kill = self._kill, None
        return await kill(self.pid, is_status_wanted) if kill is not None else None

    def close(self) -> None:
        """Close the socket."""
        self.is_lost = True
        if self._transport is not None:
            self._transport.abort()


class ForkServer:
    """The warm process that forks workers in milliseconds. When it dies its workers die with it; start another."""

    def __init__(self, process: Process, control: socket.socket) -> None:
        self._process = process
        self._control = control
        self._lines: asyncio.Queue[list[str]] = asyncio.Queue()
        self._ended: dict[int, asyncio.Future[int]] = {}
        self._reading = asyncio.create_task(self._read(), name="grader-fork-server")
        self.is_lost = False

    @classmethod
    async def start(cls, module: str, *, memory_mb: int, timeout_s: float, alarm_s: int) -> "ForkServer":
        """Start the process, `python -m module`, and wait until it is warm. Raises WorkerError."""
        flags = {"--memory-mb": memory_mb, "--timeout-s": timeout_s, "--alarm-s": alarm_s, "--parent": os.getpid()}
        ours, theirs = socket.socketpair()
        ours.settimeout(0)
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", module,
                *(str(part) for flag in flags.items() for part in flag),
                stdin=theirs.fileno(), stdout=DEVNULL, env=_environment(), start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            ours.close()
            raise WorkerError("start") from error
        finally:
            theirs.close()
        server = cls(process, ours)
        try:
            await server._expect("ready", timeout_s=START_TIMEOUT_S)
        except BaseException:
            await server.close()
            raise
        return server

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    async def fork(self) -> Worker:
        """Fork a worker; `Worker.ready` waits for its first item. One call at a time. Raises WorkerError."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                socket.send_fds(self._control, [b"fork\n"], [theirs.fileno()])
            [pid] = await self._expect("forked", timeout_s=FORK_TIMEOUT_S)
            _, worker = await asyncio.get_running_loop().create_connection(lambda: Worker(self._kill), sock=ours)
        except BaseException as error:
            ours.close()
            self.is_lost = True  # stopped, or out of step
            if isinstance(error, OSError):
                raise WorkerError("start") from error
            raise
        worker.pid = int(pid)
        return worker

    async def _kill(self, pid: int, is_status_wanted: bool) -> int | None:  # noqa: FBT001 - only for Worker.kill
        if self.is_lost:
            return None
        ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._ended[pid] = ended
        try:
            self._control.send(f"kill {pid}\n".encode())
            if is_status_wanted:
                async with asyncio.timeout(STATUS_TIMEOUT_S):
                    return await ended
        except OSError:  # TimeoutError is one: it is stopped, or ending
            self._ended.pop(pid, None)
        return None

    async def close(self) -> None:
        """Kill it with all its workers, and reap it."""
        self.is_lost = True
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        self._control.close()
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it may have ended this instant
                os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()

    async def _expect(self, word: str, *, timeout_s: float) -> list[str]:
        try:
            async with asyncio.timeout(timeout_s):
                line = await self._lines.get()
        except TimeoutError as error:
            raise WorkerError("start") from error
        if line[:1] != [word]:
            raise WorkerError("start")
        return line[1:]

    async def _read(self) -> None:
        loop, unread = asyncio.get_running_loop(), b""
        try:
            while portion := await loop.sock_recv(self._control, 4_096):
                *lines, unread = (unread + portion).split(b"\n")
                for line in lines:
                    self._heard(line.decode().split())
        except ConnectionError:
            pass  # as its end
        self.is_lost = True
        self._lines.put_nowait([])

    def _heard(self, line: list[str]) -> None:
        match line:
            case ["ended", pid, status]:
                ended = self._ended.pop(int(pid), None)
                if ended is not None and not ended.done():
                    ended.set_result(int(status))
            case _:
                self._lines.put_nowait(line)


def _environment() -> dict[str, str]:
    """What a worker needs and nothing else: no tokens reach the process that reads hostile text."""
    keep = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "HOME", "TMPDIR")
    root = str(Path(__file__).resolve().parents[2])
    return {name: os.environ[name] for name in keep if name in os.environ} | {
        "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "SYMPY_GROUND_TYPES": "python",  # SIGALRM is not delivered inside GMP
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
