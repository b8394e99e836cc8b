"""Published versions as files, for replicas that join while no transfer is due: on shared storage, or over HTTP.

`GET /weights/NAME` with the control token as bearer. Which file is the newest stands in the registry.
"""

import hmac
import os
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from services.contracts.registry import WeightsFile
from services.contracts.weights.file import write
from services.contracts.weights.staging import Arena, Received

KEPT = 2  # a replica may be reading the one before
REQUEST_TIMEOUT_S = 30.0  # without a byte taken
ROUTE = "/weights/"


class WeightFiles:
    """The newest few versions in a folder, made when needed. Whoever reads one finds it whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._server: ThreadingHTTPServer | None = None
        self._url = ""

    def serve(self, host: str, port: int, *, token: str) -> None:
        """Hand the files out over HTTP too. Raises OSError when the port is taken."""
        self._server = ThreadingHTTPServer((host, port), _handler(self.folder, token))
        self._server.daemon_threads = True
        self._url = f"http://{host}:{self._server.server_address[1]}{ROUTE}"
        threading.Thread(target=self._server.serve_forever, name="weight files", daemon=True).start()

    def put(self, arena: Arena, received: Received, *, version: int) -> WeightsFile:
        """Write a version, remove old ones. Raises OSError; the earlier ones are intact then."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for abandoned in self.folder.glob(".partial-*"):
            abandoned.unlink(missing_ok=True)
        path = self.folder / f"v{version:08d}-{received.fingerprint}.safetensors"
        write(path, arena, received, version=version)
        by_age = sorted(self.folder.glob("v*.safetensors"), key=lambda one: one.stat().st_mtime_ns)
        for old in by_age[:-KEPT]:
            old.unlink(missing_ok=True)
        where = self._url + path.name if self._url else str(path.resolve())
        return WeightsFile(
            version=version, fingerprint=received.fingerprint, num_bytes=received.plan.num_bytes, where=where
        )

    def close(self) -> None:
        """Hand nothing out any more."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()


def _handler(folder: Path, token: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = REQUEST_TIMEOUT_S

        def do_GET(self) -> None:
            given = self.headers.get("Authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
                return self.send_error(401)
            name = self.path.removeprefix(ROUTE)
            if not self.path.startswith(ROUTE) or name != os.path.basename(name) or name.startswith("."):
                return self.send_error(404)
            try:
                stream = (folder / name).open("rb")
            except OSError:
                return self.send_error(404)
            with stream:
                self.send_response(200)
                self.send_header("Content-Type", "application/octet-stream")
                self.send_header("Content-Length", str(os.fstat(stream.fileno()).st_size))
                self.end_headers()
                shutil.copyfileobj(stream, self.wfile, 1 << 20)
            return None

        def log_message(self, format: str, *args: object) -> None:
            """Not on stderr: it has JSON lines only."""

    return Handler
