"""The ledger's store during a run: the Redis that the configuration names, or an embedded Valkey kept alive.

The embedded one is stopped last: services still write to the ledger while they stop.
"""

import asyncio
from pathlib import Path

from services.cli.progress import Progress
from services.cli.supervisor import Supervisor, backoff_s
from services.contracts.config import ConfigError
from services.contracts.valkey import EmbeddedValkey

LOOK_S = 0.5  # how soon a dead server is noticed
START_POLL_S = 0.02
MAX_FAILURES = 5  # to start it again, in a row


class EmbeddedStore:
    """A Valkey on `folder`. A crash costs at most the last second of writes; it is started again on its data."""

    def __init__(self, folder: Path, supervisor: Supervisor, progress: Progress) -> None:
        self._server = EmbeddedValkey(folder)
        self._supervisor, self._progress = supervisor, progress
        self._starting: asyncio.Task[None] | None = None
        self._pid: int | None = None

    async def start(self) -> str:
        """Start it and keep it alive until the supervisor stops. Returns its URL. Raises ConfigError."""
        await self._start()
        self._supervisor.keep_task(self._keep())
        return self._server.url

    async def stop(self) -> None:
        """Write everything out and end."""
        if self._starting is not None:
            await asyncio.wait({self._starting})
        await asyncio.to_thread(self._server.stop)
        self._forget()

    async def _start(self) -> None:
        self._starting = asyncio.create_task(asyncio.to_thread(self._server.start))
        while not self._starting.done():  # it is watched as soon as it exists, not only once it answers
            if self._pid is None and (pid := self._server.pid) is not None:
                self._pid = pid
                self._supervisor.watchdog.watch(pid)
            await asyncio.wait({self._starting}, timeout=START_POLL_S)
        self._starting.result()

    async def _keep(self) -> None:
        """Raises ConfigError when it cannot be started again."""
        failures = 0
        while True:
            await asyncio.sleep(LOOK_S if not failures else backoff_s(failures))
            if self._server.pid is not None:
                continue
            self._progress.say("the embedded Valkey ended; starting it again on its data")
            self._forget()
            try:
                await self._start()
            except ConfigError as error:
                failures += 1
                if failures >= MAX_FAILURES:
                    raise
                self._progress.say(f"{error}; trying again in {backoff_s(failures):g} s")
            else:
                failures = 0

    def _forget(self) -> None:
        if self._pid is not None:
            self._supervisor.watchdog.forget(self._pid)
            self._pid = None
