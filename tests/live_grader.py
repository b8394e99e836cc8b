"""A real grader process on a free port, for tests that speak to one."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from processes import free_port

ROOT = Path(__file__).parents[1]
START_S = 60.0


@contextmanager
def live_grader(*, port: int | None = None, api_key: str | None = None) -> Iterator[str]:
    """Its URL, once a worker is warm. Killed at the end."""
    port = port or free_port()
    environment = {name: value for name, value in os.environ.items() if name != "GRADER_API_KEY"}
    process = subprocess.Popen(
        [sys.executable, "-m", "services.grader", "--port", str(port), "--workers", "1"],
        cwd=ROOT,
        env=environment | ({"GRADER_API_KEY": api_key} if api_key else {}),
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_ready(f"http://127.0.0.1:{port}", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait(10)


def wait_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        assert process.poll() is None, f"the grader ended with {process.returncode}"
        try:
            if httpx.get(f"{url}/readyz", timeout=5).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"not ready within {START_S:g} s")
