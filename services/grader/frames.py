"""Frames between the pool and its worker processes: four bytes of length (big-endian), then ASCII JSON. No pickle."""

import json
import struct
from typing import Any

LENGTH = struct.Struct(">I")
MAX_FRAME_BYTES = 32 * 2**20


def encode(message: dict[str, Any]) -> bytes:
    """One message as length and ASCII JSON; a lone surrogate travels as its escape."""
    body = json.dumps(message, separators=(",", ":")).encode("ascii")
    return LENGTH.pack(len(body)) + body
