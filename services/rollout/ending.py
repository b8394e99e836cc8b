"""How a replica's process ends when nothing is to be waited for: at a second signal, or when its GPU is no longer its.

What it held comes back by itself: leases run out, in the ledger and of the GPU, and the heartbeat in the registry.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn


def end_at_once(code: int, reason: str = "") -> NoReturn:
    """End this process and the engine's where they stand, from any thread. reason: the last line on standard error."""
    for child in multiprocessing.active_children():
        child.kill()
    if reason:
        os.write(sys.stderr.fileno(), f"multiattempt: error: {reason}\n".encode())
    os._exit(code)


class Signals:
    """SIGTERM and SIGINT: the first asks to stop, a second one ends the process where it stands.

    Handled outside the event loop, which stands still while a model is loaded. Until `ask` is set there is nothing
    to wind down, and the first signal raises SystemExit.
    """

    def __init__(self) -> None:
        self.ask: Callable[[], object] | None = None
        self._is_asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._is_asked:
            end_at_once(128 + number)
        self._is_asked = True
        if self.ask is None:
            raise SystemExit(128 + number)
        self.ask()
