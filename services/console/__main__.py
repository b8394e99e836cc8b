"""Start the console: `multiattempt serve console [RUN]`, or as a service with `--config RUN/config.json`.

Light door: arguments, configuration and the port are checked before FastAPI is imported. A mistake in any of them is
one line on standard error and exit code 2.
"""

import argparse
import logging
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from services.contracts.config import ConfigError, RunConfig, load_resolved
from services.contracts.runs import newest_run, resolved_config
from services.contracts.telemetry import configure_logging

EXIT_CONFIG = 2
RESOLVED = "config.json"  # as the launcher writes it, into the run's folder
GRACE_S = 2
ANY_ADDRESS = ("0.0.0.0", "::")


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="multiattempt serve console",
        description="A page that shows a run: curves, replicas, dialogues. It only reads, and it asks nobody who they "
        "are: let it listen on this machine alone, or behind something that does.",
    )
    parser.add_argument("run", type=Path, nargs="?", help="the run's folder; the newest under runs/ by default")
    parser.add_argument("--config", type=Path, help="configuration of a run (config.json), in place of its folder")
    parser.add_argument("--host", help="address to listen on, over console.host")
    parser.add_argument("--port", type=int, help="port, over console.port; 0 picks a free one")
    arguments = parser.parse_args(argv)
    try:
        path = arguments.config or resolved_config(arguments.run or newest_run())
        config = load_resolved(path)
        folder = path.parent if path.name == RESOLVED else config.run_dir
        host = arguments.host or config.console.host
        listener = _listen(host, config.console.port if arguments.port is None else arguments.port)
    except ConfigError as error:
        print(f"multiattempt: error: {error}", file=sys.stderr)  # noqa: T201 - the one line
        return EXIT_CONFIG
    configure_logging("console", run=config.run.name)
    return _serve(config, folder, listener)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"console.host {host}: {error.strerror or error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except (OSError, OverflowError) as error:
        listener.close()
        raise ConfigError(f"console.port {port} on {host}: {error}; choose another with --port (0: any)") from error
    return listener


def _serve(config: RunConfig, folder: Path, listener: socket.socket) -> int:
    import uvicorn

    from services.console.app import create_app
    from services.console.source import Source

    host, port = listener.getsockname()[:2]
    shown = "localhost" if host in (*ANY_ADDRESS, "127.0.0.1") else f"[{host}]" if ":" in host else host
    if sys.stdout.isatty():
        print(f"Console of {folder}: http://{shown}:{port}/  Ctrl-C stops it.", flush=True)  # noqa: T201
    logging.getLogger("services.console").info("listening", extra={"host": host, "port": port})
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(Source(config, folder)), log_config=None, access_log=False, timeout_graceful_shutdown=GRACE_S
        )
    )

    def stop(_signal: int, _frame: object) -> None:
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    server.run(sockets=[listener])
    return 0 if server.started else 1


if __name__ == "__main__":
    sys.exit(main())
