"""How exact sampled log-probabilities are, and whether a task is the same dialogue again: `make bench-exactness`.

Each case runs the same dialogues (--dialogues of up to five attempts on sums) through the real engine and dialogue
machine: on one engine, among others in another order, on a second engine, and on a third with one thread. What was
sampled with is then compared with one forward pass of plain transformers over each dialogue:

- `same`: the engine against transformers in the same dtype. The learner recomputes in it: this is the difference that
  training sees. Where model.fp32_head is set, both compute the output head in fp32.
- `wider`: the engine against transformers in the next wider dtype (fp32 for bf16, fp64 for fp32), the same weights.
- `floor`: transformers in the dtype against transformers in the wider one: what rounding alone does to such a model.

The last lines printed are JSON: for differences and KL estimates ours is `same` and the reference `floor`; for shares
of identical dialogues the reference is all of them.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.contracts.config import RunConfig, load
from services.contracts.problems import load_problems
from services.contracts.wire import Task, Trajectory
from services.learner.prepare import prepare
from services.learner.sampler import TaskSampler
from tests.dialogue_run import ROOT, DialogueRun, Pass
from tests.exactness import Agreement, agreement, recompute, share_identical

MAX_ATTEMPTS = 5
TIMEOUT_S = 1_800.0
PASSES = (Pass(64), Pass(7, backwards=True))
WIDER = {"bfloat16": "float32", "float32": "float64"}
SMOLLM2_FLAGS = (
    "--data.source=arithmetic", "--model.warmup_steps=0", "--dialogue.tokens_per_attempt=48",
    "--dialogue.tokens_per_dialogue=240", "--rollout.max_num_seqs=64",
    "--dialogue.system_prompt=You solve sums. Put the final answer within \\boxed{{}}. You have {attempts}.",
    '--dialogue.examples=[["What is 23+45?", "23+45 = 68, so the answer is \\\\boxed{68}."]]',
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model in a dtype."""

    config: str
    flags: tuple[str, ...]
    dtype: str


CASES = {
    "tiny fp32": Case("configs/demo.toml", (), "float32"),
    "tiny bf16": Case("configs/demo.toml", (), "bfloat16"),
    "smollm2 bf16": Case("configs/smollm2-cpu.toml", SMOLLM2_FLAGS, "bfloat16"),
    "smollm2 bf16, fp32 head": Case("configs/smollm2-cpu.toml", (*SMOLLM2_FLAGS, "--model.fp32_head=true"), "bfloat16"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=";".join(CASES), help="some of: " + ";".join(CASES))
    parser.add_argument("--dialogues", type=int, default=200)
    arguments, flags = parser.parse_known_args()
    claims: list[dict[str, Any]] = []
    for name in arguments.cases.split(";"):
        with tempfile.TemporaryDirectory(prefix="bench-exactness-") as folder:
            claims += measure(name, arguments.dialogues, flags, Path(folder))
    print()
    for claim in claims:
        print(json.dumps({"benchmark": "rollout_exactness", **claim}))


def measure(name: str, num_dialogues: int, flags: Sequence[str], folder: Path) -> Iterator[dict[str, Any]]:
    """The claims of one case."""
    case = CASES[name]
    # threads: all cores, but for the third engine.
    settings = [*case.flags, "--rollout.device=cpu", "--rollout.threads=0", *flags]
    config = load(ROOT / case.config, [*settings, f"--model.dtype={case.dtype}"], env={})
    # Both dtypes of a model begin with the same weights: those of its own configuration.
    model = _in_dtype(prepare(load(ROOT / case.config, settings, env={})), case.dtype, folder / "model")
    sampler = TaskSampler(load_problems(config).train, seed=0, min_attempts=1, max_attempts=MAX_ATTEMPTS)
    tasks = [sampler.task(i, batch=0, min_version=0) for i in range(num_dialogues)]
    first, among_others, again, one_thread = _run_all(config, model, tasks, folder)
    same, wider, floor = _compare(model, config, list(first.values()))
    shares = {
        "another batch composition": share_identical(first, among_others),
        "a second engine": share_identical(first, again),
        "a second engine with one thread": share_identical(first, one_thread),
    }
    _print_table(name, len(first), {"same": same, "wider": wider, "floor": floor}, shares)

    def claim(what: str, ours: float, reference: float, unit: str) -> dict[str, Any]:
        numbers = {"ours": ours, "reference": reference, "ratio": ours / reference}
        return {"case": f"{name}: {what}", **{k: float(f"{v:.4g}") for k, v in numbers.items()}, "unit": unit}

    yield claim("mean absolute difference of log-probabilities", same.mean, floor.mean, "nat/token")
    yield claim("KL(behaviour || recomputed), k3", same.kl, floor.kl, "nat/token")
    for what, share in shares.items():
        yield claim(f"identical dialogues, {what}", share, 1.0, "share of dialogues")


def _run_all(config: RunConfig, model: Path, tasks: Sequence[Task], folder: Path) -> list[dict[int, Trajectory]]:
    """Both passes of one engine, then one pass each of two others."""
    single = config.model_copy(update={"rollout": config.rollout.model_copy(update={"threads": 1})})
    found: list[dict[int, Trajectory]] = []
    for name, settings, passes in (("one", config, PASSES), ("two", config, PASSES[:1]), ("three", single, PASSES[:1])):
        found += DialogueRun(settings, model, tasks, passes, folder / name).wait(TIMEOUT_S).passes
    return found


def _compare(model: Path, config: RunConfig, trajectories: Sequence[Trajectory]) -> list[Agreement]:
    """`same`, `wider`, `floor`."""
    behaviour = [one.logprobs[one.action_mask] for one in trajectories]
    dtype, fp32_head = config.model.dtype, config.model.fp32_head
    narrow, wide = (
        [recompute(weights, one, fp32_head=fp32_head and name == dtype) for one in trajectories]
        for name, weights in (
            (name, AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, name)).eval())
            for name in (dtype, WIDER[dtype])
        )
    )
    return [agreement(behaviour, narrow), agreement(behaviour, wide), agreement(narrow, wide)]


def _in_dtype(source: Path, dtype: str, folder: Path) -> Path:
    """The same weights rounded to `dtype`."""
    AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def _print_table(name: str, num_dialogues: int, found: dict[str, Agreement], shares: dict[str, float]) -> None:
    print(f"\n{name}: {num_dialogues} dialogues, {found['same'].num_tokens} sampled tokens")
    print("| against transformers | mean difference | largest | k3 KL per token | effective share of dialogues |")
    print("|---|---:|---:|---:|---:|")
    for row, one in found.items():
        print(f"| {row} | {one.mean:.2e} | {one.worst:.2e} | {one.kl:.2e} | {one.effective_share:.5f} |")
    for what, share in shares.items():
        print(f"identical dialogues, {what}: {share:.1%}")


if __name__ == "__main__":
    main()
