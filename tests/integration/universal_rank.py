"""One learner rank for test_checkpoints: `python universal_rank.py FOLDER save|load`.

For each ZeRO stage in bf16 (DeepSpeed's optimiser classes for 1 and for 2 and 3 differ) a small network takes steps and
is saved, or is restored out of what `universal.convert` made of that. Either way rank 0 writes what is known of each
parameter, and again after a step more.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from services.contracts.config import load
from services.learner.deepspeed_engine import Engine, choose_backend
from services.learner.host_copy import HostCopies
from services.learner.ranks import Ranks

STAGES = {f"zero{stage}": stage for stage in (1, 2, 3)}
RATE = 1e-3


class Network(nn.Module):
    """Two layers whose sizes no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3)).to(torch.bfloat16)

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.layers(inputs).float().square().sum()
        return output


def step(engine: Engine, ranks: Ranks, number: int) -> None:
    """The same on any number of ranks, to the bit: each adds an equal power-of-two part of the same gradient."""
    inputs = torch.randn(4, 7, generator=torch.Generator().manual_seed(number)).to(torch.bfloat16)
    engine.step([inputs], lambda rows: engine(rows) / ranks.world, lr=RATE)


def known(engine: Engine) -> dict[str, Tensor]:
    """fp32 masters and moments, whole."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found = {}
    for name, parameter in engine.module.named_parameters():
        found[name] = safe_get_full_fp32_param(parameter).clone()
        for moment in ("exp_avg", "exp_avg_sq"):
            found[f"{name} {moment}"] = safe_get_full_optimizer_state(parameter, moment).clone()
    return found


def run(folder: Path, name: str, mode: str, ranks: Ranks) -> list[dict[str, Tensor]]:
    flags = [f"--learner.zero_stage={STAGES[name]}", "--learner.device=cpu"]
    config = load(None, flags, env={}).learner
    engine = Engine(Network(), config=config, dtype=torch.bfloat16, ranks=ranks, lr=RATE)
    if mode == "load":
        engine.load(folder / "universal" / name, is_universal=True)
    else:
        for number in range(3):
            step(engine, ranks, number)
        copies = HostCopies(copies=False)
        engine.save(folder / "saved" / name, copies)
        copies.write()
    before = known(engine)
    step(engine, ranks, 3)
    return [before, known(engine)]


def main() -> None:
    folder, mode = Path(sys.argv[1]), sys.argv[2]
    choose_backend(load(None, ["--learner.device=cpu"], env={}).learner)
    torch.set_num_threads(1)
    ranks = Ranks.join(backend="gloo", timeout_s=60)
    found = {name: run(folder, name, mode, ranks) for name in STAGES}
    if ranks.leads:
        torch.save(found, folder / f"{mode}.pt")
    ranks.leave()


if __name__ == "__main__":
    main()
