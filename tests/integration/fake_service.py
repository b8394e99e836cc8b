"""Stands for any service in tests of the launcher: `fake_service.py KIND --config F ...`; acts as $FAKE_<KIND> says.

Every process that it becomes or starts leaves a file named by its id in RUN/pids.
"""

import http.server
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    kind, flags = sys.argv[1], sys.argv[2:]
    path = Path(flags[flags.index("--config") + 1])
    config, run_dir = json.loads(path.read_text()), path.parent
    note_pid(run_dir, kind, os.getpid())
    behaviour = os.environ.get(f"FAKE_{kind.upper()}", "")
    lives = len([noted for noted in (run_dir / "pids").iterdir() if noted.read_text() == kind])
    if behaviour == "misconfigured" or (behaviour == "misconfigured later" and lives == 2):
        sys.stdout.write("a line of progress\n")
        sys.stdout.flush()
        sys.stderr.write(f"multiattempt: error: {kind}.device: no such device\n")
        return 2
    if behaviour == "crash once" and not (run_dir / "crashed").exists():
        (run_dir / "crashed").touch()
        (run_dir / "checkpoints" / "step-1").mkdir(parents=True, exist_ok=True)
        sys.stderr.write("something broke\n")
        return 1
    if behaviour == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if behaviour in ("hang", "stubborn"):
        note_pid(run_dir, "grandchild", subprocess.Popen(["sleep", "300"]).pid)
        (run_dir / f"{kind}-hangs").touch()
        time.sleep(300)
    if kind in ("grader", "rollout"):
        serve(int(flags[flags.index("--port") + 1]) if "--port" in flags else config["grader"]["port"])
    if behaviour == "paused":
        serve(config["learner"]["metrics_port"], trouble="paused: no room")
    if kind == "learner":
        rows = [{"step": step, "version": step, "reward": 0.5, "step_s": 0.1} for step in (1, 2)]
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sys.stdout.write(" ".join([kind, *flags[2:]]) + "\n")
    return 0


def note_pid(run_dir: Path, kind: str, pid: int) -> None:
    (run_dir / "pids").mkdir(exist_ok=True)
    (run_dir / "pids" / str(pid)).write_text(kind)


def serve(port: int, trouble: str = "") -> None:
    class Ready(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(503 if trouble else 200)
            self.end_headers()
            self.wfile.write(json.dumps({"detail": trouble}).encode())

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    http.server.HTTPServer(("127.0.0.1", port), Ready).serve_forever()


if __name__ == "__main__":
    sys.exit(main())
