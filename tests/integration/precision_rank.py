"""One learner rank for test_precision: `python precision_rank.py OUTPUT OFFLOAD`.

For each ZeRO stage and dtype a small network takes steps under DeepSpeed; rank 0 writes what became of it to OUTPUT.
"""

import json
import math
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from services.contracts.config import load
from services.learner.deepspeed_engine import Engine, choose_backend
from services.learner.ranks import Ranks

TINY = 1e-4  # of weights near 1, whose neighbours in bf16 are 2^-8 away


class Network(nn.Module):
    """A weight matrix of ones."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8, bias=False, dtype=dtype)
        nn.init.ones_(self.layer.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.layer(inputs)
        return output.float().sum()


def weights(engine: Engine) -> Tensor:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), modifier_rank=None):
        return engine.module.layer.weight.detach().float().clone()  # type: ignore[no-any-return, union-attr]


def case(stage: int, dtype: torch.dtype, ranks: Ranks, *, offload: bool) -> dict[str, Any]:
    flags = [f"--learner.zero_stage={stage}", f"--learner.offload_optimizer={offload}".lower()]
    config = load(None, [*flags, "--learner.device=cpu", "--learner.grad_clip=1"], env={}).learner
    engine = Engine(Network(dtype), config=config, dtype=dtype, ranks=ranks, lr=TINY)
    inputs = [torch.full((1, 8), float(i + 1)).to(dtype) for i in range(3)]

    def step(*, lr: float, bad: float = 1.0, whose: int = 0) -> float:
        spoil = {2: bad if ranks.rank == whose else 1.0}
        return engine.step([0, 1, 2], lambda i: engine(inputs[i]) * spoil.get(i, 1.0) / ranks.world, lr=lr)

    norms = [step(lr=TINY) for _ in range(2)]
    before = weights(engine)
    spoilt = [step(lr=1.0, bad=bad, whose=ranks.world - 1) for bad in (math.nan, math.inf)]
    kept = bool(torch.equal(weights(engine), before))
    for _ in range(100):
        norms.append(step(lr=TINY))
    moved = float((1.0 - weights(engine)).mean())
    return {
        "norms": [min(norms), max(norms)],
        "spoilt": [0.0 <= norm < math.inf for norm in spoilt],
        "kept": kept,
        "moved": moved / (len(norms) * TINY),
    }


def main() -> None:
    output, offload = Path(sys.argv[1]), sys.argv[2] == "true"
    choose_backend(load(None, ["--learner.device=cpu"], env={}).learner)
    torch.set_num_threads(1)
    ranks = Ranks.join(backend="gloo", timeout_s=60)
    stages = (1, 2, 3) if offload else (0, 1, 2, 3)
    dtypes = (torch.bfloat16,) if offload else (torch.float32, torch.bfloat16)
    found = {f"{stage} {dtype}": case(stage, dtype, ranks, offload=offload) for stage, dtype in product(stages, dtypes)}
    if ranks.leads:
        output.write_text(json.dumps(found))
    ranks.leave()


if __name__ == "__main__":
    main()
