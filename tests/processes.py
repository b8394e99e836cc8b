"""Services as processes, for tests that need the real ones."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from services.contracts.config import RunConfig

ROOT = Path(__file__).parents[1]
START_S = 120.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Service:
    """A service's process with all it started."""

    def __init__(self, name: str, config: RunConfig, port: int, *flags: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = config.run_dir / f"{name}-{port}.log"
        command = [sys.executable, "-m", f"services.{name}", "--config", str(config.run_dir / "config.json")]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--port", str(port), *flags],
                cwd=ROOT,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                if httpx.get(f"{self.url}/readyz", timeout=5).status_code == httpx.codes.OK:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        pytest.fail(f"not ready within {START_S:g} s: {self.log.read_text()[-3000:]}")

    def kill(self) -> None:
        """kill -9, the engine's process too."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)
