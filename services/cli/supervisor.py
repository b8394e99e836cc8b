"""The processes of one run: started, kept alive, stopped; none is left behind.

A service that crashes is started again after a pause that doubles, and one that says at its first start that its
configuration is wrong (exit code 2) ends the run. So does one that crashes again and again while training stands
still; as long as training goes on, a service may die as often as it likes. Every process leads a group of its own, so
that a stop reaches what it started itself, and is known to the watchdog, which ends it should the launcher be killed.
In which order to start them is `launcher`'s.
"""

import asyncio
import contextlib
import os
import re
import signal
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

import httpx

from services.cli.progress import Progress
from services.cli.services import Service
from services.cli.watchdog import Watchdog
from services.contracts.config import ConfigError

EXIT_CONFIG = 2
GRACE_S = 20.0  # between SIGTERM and SIGKILL: a checkpoint, dialogues in flight
FIRST_PAUSE_S, LAST_PAUSE_S = 1.0, 30.0
HEALTHY_S = 60.0  # a service that lived this long starts its pauses anew
MAX_CRASHES = 6  # in a row, none of them healthy, with no milestone between them
LINE_LIMIT = 500
CAUSE = re.compile(r"^(?!\{).*?((?<![\w.])[A-Za-z_][\w.]*(?:Error|Exception): .+)")


class ServiceFailed(RuntimeError):
    """A service cannot be kept alive; the run ends with exit code 1."""


class Crashes:
    """Counts those of one service: `in_row` for the pause, `at_standstill` for giving up."""

    def __init__(self, milestone: Callable[[], object]) -> None:
        self._milestone = milestone
        self.in_row = self.at_standstill = 0

    def begin(self) -> None:
        """A life begins."""
        self._started, self._reached = time.monotonic(), self._milestone()

    def count(self, *, was_ready: bool) -> None:
        """It has ended. One that lived long was healthy; so was one that was ready while training advanced."""
        lived = time.monotonic() - self._started > HEALTHY_S
        advanced = self._milestone() != self._reached
        self.in_row = 1 if lived or (advanced and was_ready) else self.in_row + 1
        self.at_standstill = 1 if lived or advanced else self.at_standstill + 1


class Supervisor:
    """Owns the processes. `stop` ends them all; then `close` ends the watchdog.

    milestone: how far training has come for good, as a value that changes when it advances. start_tries: how often a
    service that was never ready may crash.
    """

    def __init__(
        self,
        logs: Path,
        progress: Progress,
        *,
        milestone: Callable[[], object] = lambda: None,
        start_tries: int = MAX_CRASHES,
    ) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self._logs, self._progress, self._milestone, self._start_tries = logs, progress, milestone, start_tries
        self._ready: dict[str, asyncio.Event] = {}
        self.watchdog = Watchdog()
        self._alive: dict[str, asyncio.subprocess.Process] = {}
        self._keeping: list[asyncio.Task[None]] = []

    async def run_once(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Run a process to its end, forwarding its lines. Raises ConfigError for exit code 2, else ServiceFailed."""
        process = await self._spawn(name, command, environment, stdout=asyncio.subprocess.PIPE)
        assert process.stdout is not None
        # A file of its own: written late, these lines would hide the error that ends the other one (`_last_line`).
        with (self._logs / f"{name}.out.log").open("ab") as log:
            async for line in process.stdout:
                log.write(line)
                log.flush()
                self._progress.say(line.decode(errors="replace").rstrip())
        code = await self._ended(name, process)
        self._raise_if_misconfigured(name, code)
        if code:
            raise ServiceFailed(f"{name} ended with {_meaning(code)}: {self._last_line(name)}")

    def keep(self, service: Service) -> None:
        """Start a service and start it again whenever it ends, until `stop`."""
        self._ready[service.name] = asyncio.Event()
        self.keep_task(self._keep(service))

    def keep_task(self, work: Awaitable[None]) -> None:
        """Have `work` go on until `stop`; what it raises ends the run."""
        self._keeping.append(asyncio.ensure_future(work))

    async def until_ready(self, kept: Sequence[Service]) -> None:
        """Wait until each has answered 200 at its ready_url. Raises what ended one of them, or ServiceFailed."""
        await self.unless_failed(asyncio.gather(*(self._ready[service.name].wait() for service in kept)))

    async def unless_failed(self, work: Awaitable[object]) -> None:
        """Await `work`, unless something kept fails for good first, whose error is raised."""
        working = asyncio.ensure_future(work)
        try:
            done, _ = await asyncio.wait({working, *self._keeping}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)

    async def run_group(self, make: Callable[[], Sequence[Service]]) -> None:
        """Run services that belong together (the learner's ranks) until all exit with 0; a crash restarts them all."""
        crashes = Crashes(self._milestone)
        while True:
            group = make()
            crashes.begin()
            codes = await self._run_together(group)
            if not any(codes.values()):
                return
            for name, code in codes.items():
                if crashes.in_row == 0:
                    self._raise_if_misconfigured(name, code)
            crashes.count(was_ready=True)
            name = next(name for name, code in codes.items() if code)  # in order of their end: the culprit
            await self._pause_after_crash(name, codes[name], crashes)

    def kill(self) -> None:
        """SIGKILL to every service at once, for a user who does not want to wait for `stop`."""
        for process in self._alive.values():
            _signal_group(process.pid, signal.SIGKILL)

    async def stop(self) -> None:
        """End everything: SIGTERM, then SIGKILL for what is left. What it leaves running is `watchdog`'s to end."""
        for task in self._keeping:
            task.cancel()
        await asyncio.gather(*self._keeping, return_exceptions=True)
        await asyncio.gather(*(self._end(name, process) for name, process in list(self._alive.items())))

    def close(self) -> None:
        """Let the watchdog end; it first ends what is still there."""
        self.watchdog.close()

    async def _keep(self, service: Service) -> None:
        crashes, is_ready = Crashes(self._milestone), self._ready[service.name]
        was_ever_ready = False
        while True:
            crashes.begin()
            is_ready.clear()
            process = await self._spawn(service.name, service.command, service.environment)
            watching = asyncio.create_task(self._watch_start(service, process, is_restart=was_ever_ready))
            try:
                code = await self._ended(service.name, process)
                if watching.done() and (failure := watching.result()) and not was_ever_ready:
                    raise ServiceFailed(failure)
            finally:
                watching.cancel()
            was_ever_ready = was_ever_ready or is_ready.is_set()
            if not was_ever_ready:  # later, its configuration was good: what it misses is to come back
                self._raise_if_misconfigured(service.name, code)
            crashes.count(was_ready=is_ready.is_set())
            limit = MAX_CRASHES if was_ever_ready else self._start_tries
            await self._pause_after_crash(service.name, code, crashes, limit=limit)

    async def _pause_after_crash(self, name: str, code: int, crashes: Crashes, *, limit: int = MAX_CRASHES) -> None:
        if crashes.at_standstill >= limit:
            raise ServiceFailed(f"{name} failed {crashes.at_standstill} times in a row: {self._last_line(name)}")
        pause_s = backoff_s(crashes.in_row)
        self._progress.say(f"{name} ended with {_meaning(code)}; starting it again in {pause_s:g} s")
        await asyncio.sleep(pause_s)

    async def _run_together(self, group: Sequence[Service]) -> dict[str, int]:
        """Exit codes, in the order in which the processes ended."""
        processes = {s.name: await self._spawn(s.name, s.command, s.environment) for s in group}
        waiting = {asyncio.create_task(self._ended(name, p), name=name) for name, p in processes.items()}
        codes: dict[str, int] = {}
        try:
            while waiting:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                codes |= {task.get_name(): task.result() for task in done}
                if any(codes.values()) and waiting:  # the other ranks would wait for the dead one
                    await asyncio.gather(*(self._end(task.get_name(), processes[task.get_name()]) for task in waiting))
        finally:
            for task in waiting:
                task.cancel()
        return codes

    async def _spawn(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], *, stdout: int | None = None
    ) -> asyncio.subprocess.Process:
        with (self._logs / f"{name}.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *command,
                env=dict(environment),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log if stdout is None else stdout,
                stderr=log,
                start_new_session=True,
            )
        self.watchdog.watch(process.pid)
        self._alive[name] = process
        return process

    async def _ended(self, name: str, process: asyncio.subprocess.Process) -> int:
        code = await process.wait()
        if self._alive.get(name) is process:
            del self._alive[name]
            _signal_group(process.pid, signal.SIGKILL)  # what a crashed service left behind
            self.watchdog.forget(process.pid)
        return code

    async def _end(self, name: str, process: asyncio.subprocess.Process) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            _signal_group(process.pid, number)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), GRACE_S)
                break
            self._progress.say(f"{name} has not ended {GRACE_S:g} s after {number.name}")
        else:
            return  # not even SIGKILL: it sleeps in the kernel
        await self._ended(name, process)

    async def _watch_start(self, service: Service, process: asyncio.subprocess.Process, *, is_restart: bool) -> str:
        """Say when it is ready. One that is not in time is killed: it has hung, and its next start may not.

        Returns that failure, or an empty text.
        """
        started, reason = time.monotonic(), "no answer"
        async with httpx.AsyncClient(timeout=5.0, trust_env=False) as client:
            while time.monotonic() < started + service.ready_s:
                with contextlib.suppress(httpx.TransportError):
                    answer = await client.get(service.ready_url)
                    if answer.is_success:
                        again = f" again after {time.monotonic() - started:.1f} s" if is_restart else ""
                        self._progress.say(f"{service.name} is ready{again}")
                        self._ready[service.name].set()
                        return ""
                    reason = " ".join(answer.text.split())[:LINE_LIMIT]
                await asyncio.sleep(0.1)
        failure = f"{service.name} was not ready within {service.ready_s:g} s: {reason}"
        self._progress.say(failure)
        _signal_group(process.pid, signal.SIGKILL)
        return failure

    def _raise_if_misconfigured(self, name: str, code: int) -> None:
        if code == EXIT_CONFIG:
            raise ConfigError(self._last_line(name).removeprefix("multiattempt: error: "))

    def _last_line(self, name: str) -> str:
        path = self._logs / f"{name}.log"
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 65536))
            lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        return f"{last_words(lines)[:LINE_LIMIT]} (log: {path})"


def last_words(lines: Sequence[str]) -> str:
    """What a process that failed said last; where that points to a cause above it, as vLLM's does, the cause."""
    if not lines:
        return "it said nothing"
    if "root cause above" in lines[-1]:
        causes = [found[1] for line in lines[:-1] if (found := CAUSE.search(line)) and "root cause above" not in line]
        return causes[-1] if causes else lines[-1]
    return lines[-1]


def backoff_s(crashes: int) -> float:
    """Pause before the start after `crashes` crashes in a row: 1, 2, 4, ... at most 30 s."""
    return min(FIRST_PAUSE_S * 2.0 ** (crashes - 1), LAST_PAUSE_S)


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _meaning(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
