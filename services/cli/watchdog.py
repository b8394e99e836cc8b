"""Stops what the launcher started, should the launcher itself be killed.

It holds the reading end of a pipe; the launcher writes the process groups that it starts and ends (`+123`, `-123`).
End of file means that the launcher is gone, however it died: the groups still listed are ended. A process of its
own, because nobody can clean up after their own SIGKILL. Not the kernel's parent-death signal: that reaches only the
child itself, not what it started, and comes when the *thread* that started it ends.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable

GRACE_S = 5.0


class Watchdog:
    """The launcher's end."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "services.cli.watchdog"], stdin=subprocess.PIPE, start_new_session=True
        )

    def watch(self, group: int) -> None:
        """End this process group if the launcher dies."""
        self._say(f"+{group}\n")

    def forget(self, group: int) -> None:
        """The group is gone."""
        self._say(f"-{group}\n")

    def close(self) -> None:
        """The launcher has cleaned up itself."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(2 * GRACE_S)

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()


def watch(lines: Iterable[str]) -> set[int]:
    """Read the launcher's lines to their end; the groups that are left."""
    groups: set[int] = set()
    for line in lines:
        (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
    return groups


def end(groups: Iterable[int], *, grace_s: float = GRACE_S) -> None:
    """SIGTERM, then SIGKILL for what is left after `grace_s` seconds."""
    left = set(groups)
    for number, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 0.0)):
        for group in left:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, number)
        deadline = time.monotonic() + wait_s
        while (left := {group for group in left if _is_alive(group)}) and time.monotonic() < deadline:
            time.sleep(0.05)


def _is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # it ends when the launcher does, not before
        signal.signal(number, signal.SIG_IGN)
    end(watch(sys.stdin))
