"""The bf16 engine on a CPU with AMX: asks the kernel for it, and says so in one line where it is not granted."""

import os
import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="this CPU has no AMX"),
]
GRANTED = "import ctypes; had = ctypes.c_uint64(); ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(had)); "
TILES = 1 << 18  # in what ARCH_GET_XCOMP_PERM (0x1022) reports
# seccomp: arch_prctl (158) with ARCH_REQ_XCOMP_PERM (0x1023) is refused with EPERM; everything else is allowed.
REFUSED = """
import ctypes, struct
steps = [(0x20, 0, 0, 0), (0x15, 0, 3, 158), (0x20, 0, 0, 16), (0x15, 0, 1, 0x1023), (6, 0, 0, 0x50001),
         (6, 0, 0, 0x7FFF0000)]
program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
header = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(program)))
assert libc.prctl(22, 2, header, 0, 0) == 0, ctypes.get_errno()
"""
START = """
import asyncio, sys
from pathlib import Path
from services.contracts.config import ConfigError, load
from services.rollout.vllm_engine import VllmEngine

config = load(None, ["--rollout.device=cpu", "--model.dtype=bfloat16"], env={})
try:
    asyncio.run(VllmEngine(config, Path("none")).start())
except ConfigError as error:
    print(error, "vllm" in sys.modules)
"""


def run(program: str) -> str:
    environment = {**os.environ, "VLLM_CONFIGURE_LOGGING": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_plug_in_asks_the_kernel_for_amx():
    asked = run(f"from services.rollout.weights import register; register(); {GRANTED} print(had.value)")
    assert int(asked.split()[-1]) & TILES


def test_without_amx_from_the_kernel_bf16_is_refused_in_one_line_before_vllm_is_imported():
    [line] = run(REFUSED + START).splitlines()
    assert 'model.dtype: "bfloat16"' in line
    assert "float32" in line
    assert line.endswith("False")
