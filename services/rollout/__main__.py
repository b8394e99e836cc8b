"""Start a replica: `python -m services.rollout --config RUN/config.json --replica-id rollout-0 --port 8100`.

Light door: arguments, configuration, environment, model folder and port are checked before vLLM is imported. A mistake
in any of them is one line on standard error and exit code 2. SIGTERM drains: dialogues in flight are finished first, or
given back when the grace period is over; a second one ends the process at once. What the replica cannot survive is the
last line on standard error, and exit code 1.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from services.contracts.config import ConfigError, RunConfig, load_resolved, model_path
from services.contracts.telemetry import configure_logging, label_logs
from services.contracts.tracing import close_tracing, configure_tracing
from services.rollout.ending import Signals
from services.rollout.environment import load_environment
from services.rollout.gpu_lease import leased_gpus

EXIT_FAILED = 1
EXIT_CONFIG = 2
ANY_ADDRESS = ("0.0.0.0", "::")
NO_LAST_WORD = "ignore::UserWarning:multiprocessing.resource_tracker"  # it outlives the replica, and would have it
CLOSE_S = 1  # for answers under way at the end: by then no dialogue is


def main(argv: Sequence[str] | None = None) -> int:
    """Live until drained. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m services.rollout", description="One rollout replica.")
    parser.add_argument("--config", type=Path, required=True, help="resolved configuration of a run (config.json)")
    parser.add_argument("--replica-id", help="name in the registry; by default made of host name and port")
    parser.add_argument("--port", type=int, help="port, over rollout.port; 0 picks a free one")
    arguments = parser.parse_args(argv)
    try:
        config = load_resolved(arguments.config)
        load_environment(config.dialogue)
        model = _model(config)
        listener = _listen(config, config.rollout.port if arguments.port is None else arguments.port)
        configure_logging("rollout", run=config.run.name)
        configure_tracing("rollout", run=config.run.name, settings=config.telemetry)
        port = listener.getsockname()[1]
        name = arguments.replica_id or f"{socket.gethostname()}-{port}"
        signals = Signals()
        os.environ["PYTHONWARNINGS"] = ",".join(filter(None, (os.environ.get("PYTHONWARNINGS"), NO_LAST_WORD)))
        import uvloop

        with leased_gpus(config, name):
            return uvloop.run(_serve(config, model, listener, replica_id=name, signals=signals))
    except ConfigError as error:
        print(f"multiattempt: error: {error}", file=sys.stderr)  # noqa: T201 - the one line
        return EXIT_CONFIG
    except Exception as error:
        logging.getLogger(__name__).exception("the replica failed")
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        print(f"multiattempt: error: the replica failed: {reason}", file=sys.stderr)  # noqa: T201 - the last line
        return EXIT_FAILED


async def _serve(config: RunConfig, model: Path, listener: socket.socket, *, replica_id: str, signals: Signals) -> int:
    import uvicorn

    from services.rollout.app import create_app
    from services.rollout.replica import ReplicaProcess

    url = f"http://{_advertised(config)}:{listener.getsockname()[1]}"
    replica = ReplicaProcess(config, model=model, replica_id=replica_id, url=url)
    label_logs(replica=replica_id, version=lambda: replica.engine.version)
    settings = uvicorn.Config(
        create_app(replica), log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=CLOSE_S
    )
    server = uvicorn.Server(settings)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    living = asyncio.create_task(replica.run())

    def stop() -> None:
        if replica.trouble is None:
            replica.drain()
        else:
            living.cancel()

    loop = asyncio.get_running_loop()
    signals.ask = lambda: loop.call_soon_threadsafe(stop)
    serving = asyncio.create_task(server._serve([listener]))
    await asyncio.wait((living, serving), return_when=asyncio.FIRST_COMPLETED)
    server.should_exit = True
    await serving
    with contextlib.suppress(asyncio.CancelledError):
        await living
    await asyncio.to_thread(close_tracing)
    return 0


def _advertised(config: RunConfig) -> str:
    """The host in this replica's URL. Raises ConfigError."""
    host = config.rollout.advertise_host or config.rollout.host
    if host not in ANY_ADDRESS:
        return host
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError as error:
        raise ConfigError(
            f"rollout.host: {host} is no address to be reached at, and this machine's name has none "
            f"({error.strerror}); set rollout.advertise_host"
        ) from error


def _model(config: RunConfig) -> Path:
    folder = model_path(config)
    if not (folder / "config.json").exists():
        raise ConfigError(f"model.path: {folder}: no config.json there; not a model folder")
    return folder


def _listen(config: RunConfig, port: int) -> socket.socket:
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((config.rollout.host, port))
        listener.listen()  # now: a port that is only bound could be bound by a second replica too
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"rollout.port {port} on {config.rollout.host}: {error.strerror}; choose another with --port (0: any)"
        ) from error
    return listener


if __name__ == "__main__":
    sys.exit(main())
