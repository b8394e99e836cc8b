"""Ports for services that have to come back on the same one."""

import random
import socket
from pathlib import Path

FIRST = 10_000
TRIES = 100
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on now.

    Below those that the kernel gives to outgoing connections, where it can be: such a connection may take the port of
    a service that has just died, and hold it while the service is being started again.
    """
    end = _first_ephemeral()
    for _ in range(TRIES if end > FIRST else 0):
        port = random.randrange(FIRST, end)
        if _is_free(host, port):
            return port
    with socket.socket() as probe:
        probe.bind((host, 0))
        found: int = probe.getsockname()[1]
        return found


def _first_ephemeral() -> int:
    try:
        return int(EPHEMERAL.read_text(encoding="ascii").split()[0])
    except OSError:  # not Linux
        return 0


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True
