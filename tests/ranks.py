"""Runs a script as one process per rank, the way the launcher starts the learner's ranks."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).parent


class RankProcesses:
    """The ranks of one run, started; `finish` waits for them."""

    def __init__(self, script: str, arguments: Sequence[str], *, world: int) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        common = {"PYTHONPATH": f"{TESTS.parent}:{TESTS}", "WORLD_SIZE": str(world)}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        self._logs = [tempfile.TemporaryFile("w+") for _ in range(world)]  # noqa: SIM115 - open until `finish`; a pipe may fill
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(TESTS / "integration" / script), *arguments],
                env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=self._logs[rank],
                stderr=subprocess.STDOUT,
            )
            for rank in range(world)
        ]

    def finish(self, *, timeout_s: float = 240) -> None:
        """Fails, with what they said, unless every rank ends with 0 in time. None is left behind."""
        deadline = time.monotonic() + timeout_s
        try:
            codes = [process.wait(max(0.0, deadline - time.monotonic())) for process in self.processes]
        finally:
            said = self.stop()
        assert not any(codes), "\n".join(said)

    def stop(self) -> list[str]:
        """Kill those that still run. Returns what each said last."""
        for process in self.processes:
            process.kill()
            process.wait(10)
        said = [log.seek(0) or log.read()[-3000:] for log in self._logs]
        for log in self._logs:
            log.close()
        return said
