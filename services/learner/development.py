"""Has the evaluation service measure a version between two updates, as a process of its own.

What it cannot measure is missing from the step's figures, and the log says why: training goes on.
"""

import asyncio
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

PROGRAM = (sys.executable, "-m", "services.evaluation")

log = logging.getLogger(__name__)


class Development:
    """Call it with the version that the replicas have. config: the run's file, which the process reads."""

    def __init__(self, config: Path, *, timeout_s: float, program: Sequence[str] = PROGRAM) -> None:
        self._command = (*program, "--config", str(config))
        self._timeout_s = timeout_s

    async def __call__(self, version: int) -> Mapping[str, float]:
        """Its figures; none when it failed, or took too long. Cancelled, it ends the process."""
        process = await asyncio.create_subprocess_exec(
            *self._command, "--version", str(version), stdout=asyncio.subprocess.PIPE
        )
        try:
            out, _ = await asyncio.wait_for(process.communicate(), self._timeout_s)
        except TimeoutError:
            log.warning("the evaluation took too long", extra={"version": version, "timeout_s": self._timeout_s})
            return {}
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            told = {"version": version, "exit_code": process.returncode}  # the reason is on standard error, our log
            log.warning("the evaluation failed", extra=told)
            return {}
        return {name: float(value) for name, value in json.loads(out).items()}
