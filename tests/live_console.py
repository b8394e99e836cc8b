"""A console on a port of its own, served from this process."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from services.console.app import create_app
from services.console.source import Source
from services.contracts.config import RunConfig

START_S = 20.0


@contextmanager
def live_console(config: RunConfig, folder: Path) -> Iterator[str]:
    """Its URL."""
    server = uvicorn.Server(
        uvicorn.Config(create_app(Source(config, folder)), port=0, log_config=None, access_log=False)
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + START_S
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(START_S)
