"""The ranks of one host where nobody else starts them (containers): one process for each GPU, ended together.

Several hosts are told apart by NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT, as torchrun has them; a single one needs
none of these. Unlike torchrun, which kills after 30 s, this waits at SIGTERM for as long as the leader takes to save:
who sent the signal decides when it has been too long.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from services.contracts.config import ConfigError

DEFAULT_PORT = 29500
POLL_S = 0.1
GRACE_S = 10.0  # for the others to find out by themselves that one has died, and say so


def run_ranks(
    num_ranks: int,
    arguments: Sequence[str],
    *,
    environ: Mapping[str, str] = os.environ,
    program: Sequence[str] = (sys.executable, "-m", "services.learner"),
) -> int:
    """Run this host's `num_ranks` ranks with `arguments` to their end.

    Returns 0, or the exit code of the first that failed (128 plus the number of the signal it died of), once the
    others are gone too. Raises ConfigError when the variables of several hosts do not fit together.
    """
    processes = [
        subprocess.Popen([*program, *arguments], env={**environ, **variables})
        for variables in rank_variables(num_ranks, environ)
    ]

    def pass_on(number: int, _: object) -> None:
        for process in processes:
            process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    failed, deadline = 0, float("inf")
    while True:
        codes = [process.poll() for process in processes]  # each of them: a dead one is only known once it is asked for
        if not failed and (failed := next((code for code in codes if code), 0)):
            deadline = time.monotonic() + GRACE_S
        if None not in codes:
            break
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(POLL_S)
    return failed if failed >= 0 else 128 - failed


def rank_variables(num_ranks: int, environ: Mapping[str, str]) -> list[dict[str, str]]:
    """What each rank of this host finds in its environment. Raises ConfigError."""
    hosts, host = _number(environ, "NNODES", 1), _number(environ, "NODE_RANK", 0)
    if not 0 <= host < hosts:
        raise ConfigError(f"NODE_RANK: {host}, but NNODES is {hosts}: the hosts are numbered from 0")
    if hosts > 1 and not environ.get("MASTER_ADDR"):
        raise ConfigError("MASTER_ADDR: empty; with several hosts (NNODES) it names the first")
    port = _number(environ, "MASTER_PORT", DEFAULT_PORT if hosts > 1 else _free_port())
    meeting = {"MASTER_ADDR": environ.get("MASTER_ADDR") or "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        {
            **meeting,
            "RANK": str(host * num_ranks + local),
            "LOCAL_RANK": str(local),
            "WORLD_SIZE": str(hosts * num_ranks),
        }
        for local in range(num_ranks)
    ]


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name) or str(default)
    if not text.isdecimal():
        raise ConfigError(f"{name}: {text!r} is not a number")
    return int(text)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
