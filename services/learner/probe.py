"""Do this machine's GPUs do what the learner asks of them? What `multiattempt doctor --gpu` runs by itself.

Versions, devices, matrix products in bf16, and the attention over several dialogues in one row, which on a GPU is
another kernel than anywhere else. Prints a line of JSON for each finding: check, good, result, remedy.
"""

import json
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from services.learner.attention import attend, rows_at

MIN_CAPABILITY = (8, 0)  # Ampere: bf16, and the attention kernel
MIN_FREE_GB = 2.0
LENGTHS = (5, 300, 77, 1)
HEADS, KEY_HEADS, WIDTH = 8, 2, 64
TOLERANCE = 0.05  # of bf16, relative to the largest number of a tensor

Finding = tuple[str, bool, str, str]
Attend = Callable[..., tuple[Tensor, None]]


def findings() -> Iterator[Finding]:
    """All of them; without a usable GPU the reason why."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:  # AssertionError: a build without CUDA
        reason = str(error).strip().splitlines()[0]
        remedy = "install the CUDA builds of torch and vLLM, and a driver new enough for them"
        yield "torch", False, f"{torch.__version__} sees no GPU: {reason}", remedy
        return
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    yield "torch", True, f"{torch.__version__}, CUDA {torch.version.cuda}, NCCL {nccl}", ""
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        yield device_finding(device)
        yield product_finding(device)
        yield attention_finding(device)


def device_finding(device: torch.device) -> Finding:
    """What it is, and whether anybody else is on it."""
    properties = torch.cuda.get_device_properties(device)
    free_gb, total_gb = (size / 2**30 for size in torch.cuda.mem_get_info(device))
    capability = (properties.major, properties.minor)
    told = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
    is_able = capability >= MIN_CAPABILITY
    remedy = (
        "another process holds it; stop that, or choose another with CUDA_VISIBLE_DEVICES"
        if is_able
        else 'it has no bf16 and no attention over rows: set model.dtype = "float32"'
    )
    good = is_able and free_gb >= MIN_FREE_GB
    return f"{device}", good, f"{told}, {free_gb:.1f} of {total_gb:.1f} GiB free", remedy


def product_finding(device: torch.device) -> Finding:
    """A matrix product in bf16 against fp32."""
    left, right = _random(512, 512, seed=0), _random(512, 512, seed=1)
    found = (left.to(device, torch.bfloat16) @ right.to(device, torch.bfloat16)).float().cpu()
    return _compared(f"{device}: bf16", [found], [left @ right])


def attention_finding(device: torch.device, *, attention: Attend = attend) -> Finding:
    """Rows of dialogues with fewer key heads than query heads, forward and backward, against fp32 on the CPU."""
    length = sum(LENGTHS)
    shapes = ((1, HEADS, length, WIDTH), (1, KEY_HEADS, length, WIDTH), (1, KEY_HEADS, length, WIDTH))
    offsets = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)

    def run(place: torch.device, dtype: torch.dtype, attention: Attend) -> list[Tensor]:
        tensors = [
            _random(*shape, seed=number).to(place, dtype).requires_grad_() for number, shape in enumerate(shapes)
        ]
        settings: dict[str, Any] = {"rows": rows_at(offsets, place)["rows"], "scaling": WIDTH**-0.5}
        output, _ = attention(SimpleNamespace(is_causal=True), *tensors, None, **settings)
        output.float().square().sum().backward()  # type: ignore[no-untyped-call]
        parts = [output, *(tensor.grad for tensor in tensors if tensor.grad is not None)]
        return [part.detach().float().cpu() for part in parts]

    name = f"{device}: attention"
    try:
        found = run(device, torch.bfloat16, attention)
    except (RuntimeError, ImportError) as error:
        return name, False, str(error).strip().splitlines()[0], "install the torch that requirements/torch.txt names"
    return _compared(name, found, run(torch.device("cpu"), torch.float32, attend))


def _compared(name: str, found: list[Tensor], wanted: list[Tensor]) -> Finding:
    pairs = zip(found, wanted, strict=True)
    differences = [float((ours - theirs).abs().max() / theirs.abs().max()) for ours, theirs in pairs]
    good = all(difference < TOLERANCE for difference in differences)  # not so for NaN
    told = ", ".join(f"{difference:.1e}" for difference in differences)
    return name, good, f"{told} from fp32 (bf16 may differ by {TOLERANCE:g})", "the GPU or its build is faulty"


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def main() -> None:
    """Print what was found."""
    for finding in findings():
        sys.stdout.write(json.dumps(finding) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
