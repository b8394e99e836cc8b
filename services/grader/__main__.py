"""Start the grader: `python -m services.grader --config RUN/config.json`, or with `--port 8000` and defaults.

Light door: arguments, configuration and the port are checked before FastAPI is imported. A mistake in any of them is
one line on standard error and exit code 2.
"""

import argparse
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from services.contracts.config import ConfigError, load_resolved, secret_from_env
from services.contracts.settings import GraderSection, TelemetrySection
from services.contracts.telemetry import configure_logging
from services.contracts.tracing import close_tracing, configure_tracing

EXIT_CONFIG = 2
DEFAULT_PORT = 8000  # on its own the grader wants a port that a person can guess
BACKLOG = 2048
GRACE_S = 10  # for running requests at SIGTERM
API_KEY_VARIABLE = "GRADER_API_KEY"
ANY_ADDRESS = ("0.0.0.0", "::")


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="multiattempt serve grader",
        description="The math-verification service: a page to try it at /, the interface's documentation at /docs.",
        epilog=f"With {API_KEY_VARIABLE} set in the environment, every POST must carry it: "
        f"`Authorization: Bearer ${API_KEY_VARIABLE}`.",
    )
    parser.add_argument("--config", type=Path, help="resolved configuration of a run (config.json)")
    parser.add_argument("--host", help="address to listen on")
    parser.add_argument("--port", type=int, help=f"port; 0 picks a free one; without --config {DEFAULT_PORT}")
    parser.add_argument("--workers", type=int, help="worker processes")
    arguments = parser.parse_args(argv)
    try:
        run, section, telemetry = _settings(arguments)
        api_key = _api_key()
        listener = _listen(section)
        configure_tracing("grader", run=run, settings=telemetry)
    except ConfigError as error:
        print(error, file=sys.stderr)  # noqa: T201 - the one line
        return EXIT_CONFIG
    configure_logging("grader", run=run)
    if arguments.config is None and sys.stdout.isatty():
        print(_welcome(listener), flush=True)  # noqa: T201 - for a person
    try:
        return _serve(section, listener, api_key)
    finally:
        close_tracing()


def _settings(arguments: argparse.Namespace) -> tuple[str, GraderSection, TelemetrySection]:
    """The run's name, the [grader] section, flags over file, and [telemetry]."""
    flags = {name: getattr(arguments, name) for name in ("host", "port", "workers")}
    given = {name: value for name, value in flags.items() if value is not None}
    run, base, telemetry = "standalone", GraderSection(port=DEFAULT_PORT), TelemetrySection()
    if arguments.config is not None:
        config = load_resolved(arguments.config)
        run, base, telemetry = config.run.name, config.grader, config.telemetry
    try:
        return run, GraderSection(**{**base.model_dump(), **given}), telemetry
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"grader.{first['loc'][0]}: {first['msg']}, got {first['input']!r}") from error


def _api_key() -> str | None:
    """The bearer token wanted, if any, by the variable or by the file that GRADER_API_KEY_FILE names.

    Taken out of the environment, so that worker processes never hold it.
    """
    api_key = secret_from_env(API_KEY_VARIABLE)
    os.environ.pop(API_KEY_VARIABLE, None)
    if not all("!" <= character <= "~" for character in api_key):
        raise ConfigError(f"{API_KEY_VARIABLE}: printable ASCII without spaces is wanted (is a line break at its end?)")
    return api_key or None


def _welcome(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    shown = "localhost" if host in ANY_ADDRESS else f"[{host}]" if ":" in host else host
    return f"Math grader: try it at http://{shown}:{port}/ (API: /docs). Ctrl-C stops it."


def _listen(section: GraderSection) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            section.host, section.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"grader.host {section.host}: {error.strerror or error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"grader.port {section.port} on {section.host}: {error.strerror}; choose another with --port "
            f"or grader.port (0 picks a free one)"
        ) from error
    return listener


def _serve(section: GraderSection, listener: socket.socket, api_key: str | None) -> int:
    import logging

    import uvicorn

    from services.grader.app import create_app

    host, port = listener.getsockname()[:2]
    logging.getLogger("services.grader").info(
        "listening", extra={"host": host, "port": port, "workers": section.workers}
    )
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(section, api_key=api_key),
            log_config=None,
            access_log=False,
            loop="asyncio",
            timeout_graceful_shutdown=GRACE_S,
        )
    )

    def stop(_signal: int, _frame: object) -> None:
        server.should_exit = True

    for number in (
        signal.SIGTERM,
        signal.SIGINT,
    ):  # uvicorn raises a caught signal anew at its end: exit code 0, not -15
        signal.signal(number, stop)
    server.run(sockets=[listener])
    return 0 if server.started else 1


if __name__ == "__main__":
    sys.exit(main())
