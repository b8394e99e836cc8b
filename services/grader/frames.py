"""Frames between the pool and its worker processes: four bytes of length (big-endian), then ASCII JSON. No pickle."""

import json
import struct
from collections.abc import Iterator
from typing import Any

LENGTH = struct.Struct(">I")
MAX_FRAME_BYTES = 32 * 2**20


def encode(message: dict[str, Any]) -> bytes:
    """One message as length and ASCII JSON; a lone surrogate travels as its escape."""
    body = json.dumps(message, separators=(",", ":")).encode("ascii")
    return LENGTH.pack(len(body)) + body


class Decoder:
    """Puts frames together from bytes that come in any portions."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, portion: bytes) -> Iterator[dict[str, Any]]:
        """Yield the messages that are complete now. Raises ValueError for what is no frame of ours."""
        self._bytes += portion
        while len(self._bytes) >= LENGTH.size:
            (length,) = LENGTH.unpack_from(self._bytes)
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"a frame has at most {MAX_FRAME_BYTES} bytes, one of {length} came")
            end = LENGTH.size + length
            if len(self._bytes) < end:
                return
            message = json.loads(self._bytes[LENGTH.size : end])
            del self._bytes[:end]
            if not isinstance(message, dict):
                raise ValueError(f"a frame holds a JSON object, not {type(message).__name__}")
            yield message
