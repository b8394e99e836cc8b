"""One learner process for test_gradient_accumulation: `python accumulation_rank.py STAGE DTYPE OFFLOAD OUTPUT`.

Takes one optimiser step over 64 micro-batches of a small network and writes the norm that the engine saw, next to
that of the same gradients added up in double precision.
"""

import json
import math
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from services.contracts.config import load
from services.learner.deepspeed_engine import Engine, choose_backend
from services.learner.ranks import Ranks

MICROS = 64


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)).to(dtype)


def loss(module: nn.Module | Engine, inputs: Tensor) -> Tensor:
    return (module(inputs).float() - 1.0).square().sum() / (MICROS * len(inputs))


def exact_norm(module: nn.Module, micros: list[Tensor]) -> float:
    totals = [torch.zeros(p.shape, dtype=torch.float64) for p in module.parameters()]
    for micro in micros:
        for total, gradient in zip(
            totals, torch.autograd.grad(loss(module, micro), [*module.parameters()]), strict=True
        ):
            total += gradient.double()
    return math.sqrt(sum(float(total.square().sum()) for total in totals))


def main() -> None:
    stage, dtype, offload, output = sys.argv[1], getattr(torch, sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    flags = [f"--learner.zero_stage={stage}", f"--learner.offload_optimizer={offload}", "--learner.device=cpu"]
    config = load(None, flags, env={}).learner
    choose_backend(config)
    torch.set_num_threads(1)
    ranks = Ranks.join(backend="gloo", timeout_s=60)
    micros = [torch.randn(16, 64, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(MICROS)]
    engine = Engine(network(dtype), config=config, dtype=dtype, ranks=ranks, lr=1e-3)
    norm = engine.step(micros, lambda micro: loss(engine, micro), lr=1e-3)
    output.write_text(json.dumps({"norm": norm, "exact": exact_norm(network(dtype), micros)}))
    ranks.leave()


if __name__ == "__main__":
    main()
