"""The learner: a full PPO step against a plain PyTorch loop, and rows of several dialogues against padded ones.

    python -m benchmarks.learner                   demo, tinyqwen, smollm2 on CPUs; with a GPU smollm2 and qwen1.5b
    python -m benchmarks.learner --model smollm2 --learner.zero_stage=2    any setting of the learner's

Ours is `Ppo.update` over DeepSpeed engines: packing, the first pass of actor, critic and reference, and all optimiser
steps of actor and critic. The plain loop gets the same micro-batches and does the same forward and backward passes with
the same losses: transformers' own modules, log_softmax over the logits of the action tokens, torch's AdamW (with fp32
masters for bf16 weights), clipping, nothing else. Both take turns, after a round that does not count; medians. Memory
is the peak of a process (GPU: of the allocator) that does one side only. The dialogues have the lengths of real ones
(`dialogues.json`: what the demo's and SmolLM2's rollout made); their tokens and the models' weights are random.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from services.contracts.config import RunConfig, load
from services.contracts.wire import Attempt, FinishReason, Timings, Trajectory, Verdict, VersionSpan
from services.learner.arithmetic_model import build_model, build_tokenizer
from services.learner.attention import NAME, rows_at
from services.learner.batch import Layout, MicroBatch, Plan
from services.learner.deepspeed_engine import Engine, choose_backend
from services.learner.first_pass import inputs, where
from services.learner.kl import kl
from services.learner.losses import importance_weights, policy_loss_sum, value_loss_sum
from services.learner.models import load_actor, load_critic
from services.learner.ppo import Ppo
from services.learner.ranks import Ranks
from services.learner.stopwatch import STEP_PARTS

ROOT = Path(__file__).parents[1]
SIDES = ("packed", "plain", "padded")
GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what `Ranks.join` sets
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # bf16, dense
COMMON = ("--learner.mismatch_limit=0", "--learner.lr=1e-6", "--learner.critic_lr=1e-6")


@dataclass(frozen=True)
class Model:
    """A model to measure with. shape: of SHAPES, or "" for the demo's. lengths: of which
    dialogues, each `stretch` times as long.
    """

    config: str
    shape: str
    flags: tuple[str, ...]
    lengths: str
    num_dialogues: int
    stretch: int = 1


MODELS = {
    "demo": Model("configs/demo.toml", "", ("--learner.batch_dialogues=256",), "demo", 256),
    "tinyqwen": Model(
        "configs/demo.toml",
        "tinyqwen",
        (
            "--model.dtype=bfloat16", "--learner.zero_stage=2", "--learner.threads=0",
            "--learner.batch_dialogues=64", "--learner.minibatch_dialogues=32",
        ),
        "smollm2", 64,
    ),
    "smollm2": Model(
        "configs/smollm2-cpu.toml",
        "SmolLM2-135M",
        ("--learner.batch_dialogues=16", "--learner.minibatch_dialogues=16", "--learner.threads=0"),
        "smollm2", 16,
    ),
    "smollm2-gpu": Model(
        "configs/smollm2-cpu.toml",
        "SmolLM2-135M",
        (
            "--learner.batch_dialogues=192", "--learner.minibatch_dialogues=96", "--learner.threads=0",
            "--learner.micro_tokens=32768", "--learner.logits_mb=4096",
        ),
        "smollm2", 192,
    ),
    "qwen1.5b": Model(
        "configs/smollm2-cpu.toml",
        "Qwen2.5-1.5B",
        (
            "--learner.batch_dialogues=192", "--learner.minibatch_dialogues=96", "--learner.threads=0",
            "--learner.micro_tokens=16384", "--learner.logits_mb=4096",
        ),
        "smollm2", 192, stretch=6,
    ),
}  # fmt: skip
ON_CPU, ON_GPU = ("demo", "tinyqwen", "smollm2"), ("smollm2-gpu", "qwen1.5b")


SHAPES: dict[str, tuple[type[PreTrainedModel], PreTrainedConfig]] = {
    "SmolLM2-135M": (
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, head_dim=64, max_position_embeddings=8192, tie_word_embeddings=True,
        ),
    ),
    "Qwen2.5-1.5B": (
        Qwen2ForCausalLM,
        Qwen2Config(
            vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
            num_key_value_heads=2, max_position_embeddings=8192, tie_word_embeddings=True,
        ),
    ),
    "tinyqwen": (  # platform.md's
        Qwen2ForCausalLM,
        Qwen2Config(
            vocab_size=49_152, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=False,
        ),
    ),
}  # fmt: skip


def make_model(shape: str, folder: Path) -> Path:
    """A model of this shape with random weights; made once. "": the demo's own."""
    if not folder.exists():
        torch.manual_seed(0)
        if not shape:
            build_model(build_tokenizer(), context=224).save_pretrained(folder)
            return folder
        kind, config = SHAPES[shape]
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = kind(config)
        model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def dialogues(model: Model, *, vocab: int) -> list[Trajectory]:
    """Recorded lengths, random tokens."""
    spans = json.loads((ROOT / "benchmarks" / "dialogues.json").read_text())[model.lengths]
    random = np.random.default_rng(0)
    chosen = random.permutation(len(spans))[: model.num_dialogues]
    return [_dialogue(i, [model.stretch * x for x in spans[k]], vocab, random) for i, k in enumerate(chosen.tolist())]


def _dialogue(task_id: int, places: Sequence[int], vocab: int, random: np.random.Generator) -> Trajectory:
    length, spans = places[-1], list(zip(places[:-1:2], places[1:-1:2], strict=True))
    mask = np.zeros(length, dtype=bool)
    for start, end in spans:
        mask[start:end] = True
    return Trajectory(
        task_id=task_id,
        batch=0,
        token_ids=random.integers(0, vocab, length).astype(np.int32),
        action_mask=mask,
        logprobs=np.where(mask, -np.log(vocab), np.nan).astype(np.float32),
        versions=tuple(VersionSpan(0, start, end) for start, end in spans),
        attempts=tuple(
            Attempt(start=start, end=end, extracted="1", verdict=Verdict.INCORRECT, grading_ms=1.0)
            for start, end in spans
        ),
        max_attempts=5,
        reward=float(random.choice([1.0, -0.5, -1.0])),
        finish_reason=FinishReason.ATTEMPTS,
        replica_id="bench",
        timings=Timings(generate_s=0.1, grade_s=0.1, total_s=0.2),
    )


class Ours:
    """`Ppo` over DeepSpeed, as the learner builds it."""

    def __init__(self, config: RunConfig, path: Path, ranks: Ranks, *, layout: Layout) -> None:
        learner, dtype = config.learner, getattr(torch, config.model.dtype)

        def engine(module: torch.nn.Module, lr: float | None) -> Engine:
            return Engine(module, config=learner, dtype=dtype, ranks=ranks, lr=lr)

        recompute, keep = learner.gradient_checkpointing, learner.logits_mb << 20
        actor = load_actor(path, dtype=dtype, temperature=1.0, gradient_checkpointing=recompute, keep_bytes=keep)
        critic = load_critic(path, dtype=dtype, seed=0, gradient_checkpointing=recompute)
        self.ppo = Ppo(
            engine(actor, learner.lr),
            engine(critic, learner.critic_lr),
            engine(load_actor(path, dtype=dtype, temperature=1.0), None),
            config=learner, ranks=ranks, seed=0, total_updates=100, layout=layout,
        )  # fmt: skip
        self.figures: dict[str, float] = {}

    def update(self, batch: Sequence[Trajectory]) -> None:
        self.figures = self.ppo.update(batch, version=0)


class Plain:
    """The same arithmetic, written down without a framework."""

    def __init__(self, config: RunConfig, path: Path, device: torch.device) -> None:
        self.config, self.device = config.learner, device
        dtype = getattr(torch, config.model.dtype)

        def lm() -> Any:
            return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=NAME).to(device)

        self.actor, self.reference = lm().train(), lm().eval().requires_grad_(requires_grad=False)
        self.critic = AutoModel.from_pretrained(path, dtype=dtype, attn_implementation=NAME).to(device).train()
        self.value = torch.nn.Linear(self.critic.config.hidden_size, 1, bias=False, dtype=dtype, device=device)
        if self.config.gradient_checkpointing:
            for model in (self.actor, self.critic):
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.steps = [Adam([*self.actor.parameters()], self.config.lr)]
        self.steps.append(Adam([*self.critic.parameters(), *self.value.parameters()], self.config.critic_lr))

    def hidden(self, backbone: Any, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        ids, positions, targets = inputs(micro, self.device)
        rows = rows_at(where(micro)["offsets"], self.device) if micro.offsets is not None else {}
        states = backbone(input_ids=ids, use_cache=False, **rows).last_hidden_state
        return states.flatten(0, 1)[positions], targets

    def logprobs(self, model: Any, micro: MicroBatch) -> Tensor:
        hidden, targets = self.hidden(model.model, micro)
        every = torch.log_softmax(model.lm_head(hidden).float(), -1)
        return every.gather(-1, targets[:, None]).squeeze(-1)

    def values(self, micro: MicroBatch) -> Tensor:
        hidden, _ = self.hidden(self.critic, micro)
        return torch.nn.functional.linear(hidden.float(), self.value.weight.float()).squeeze(-1)

    def update(self, work: Plan) -> None:
        """One update on a plan of ours. Returns are stand-ins: what they are costs no time."""
        size, config = len(work.packed.behaviour), self.config
        old, before, reference = (torch.zeros(size, device=self.device) for _ in range(3))
        with torch.no_grad():
            for micro in work.inference:
                flat = torch.from_numpy(micro.flat).to(self.device)
                old[flat] = self.logprobs(self.actor, micro)
                before[flat] = self.values(micro)
                reference[flat] = self.logprobs(self.reference, micro)
        behaviour = torch.from_numpy(work.packed.behaviour).to(self.device)
        advantages = torch.sin(torch.arange(size, device=self.device).float())
        returns = before + advantages
        weights = importance_weights(old, behaviour, config.importance_cap)
        for share in work.shares:
            for micro in share.micros:
                at = torch.from_numpy(micro.flat).to(self.device)
                logprobs = self.logprobs(self.actor, micro)
                loss = policy_loss_sum(
                    logprobs, old[at], weights[at], advantages[at], clip_low=config.clip_low, clip_high=config.clip_high
                ).loss
                loss = loss + config.kl_coef * kl(logprobs, reference[at], "k3").sum()
                (loss / share.num_actions).backward()
            self.steps[0].step(config.grad_clip)
        for share in work.shares:
            for micro in share.micros:
                at = torch.from_numpy(micro.flat).to(self.device)
                loss = value_loss_sum(self.values(micro), before[at], returns[at], clip=config.value_clip).loss
                (loss / share.num_actions).backward()
            self.steps[1].step(config.grad_clip)


class Adam:
    """torch's fused AdamW on fp32 masters of the parameters: the parameters themselves, where those are fp32."""

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float) -> None:
        self.parameters = parameters
        self.is_mixed = parameters[0].dtype is not torch.float32
        self.masters = [p.detach().float().requires_grad_() for p in parameters] if self.is_mixed else parameters
        self.optimiser = torch.optim.AdamW(self.masters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step(self, clip: float) -> None:
        if self.is_mixed:
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                assert parameter.grad is not None
                master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.masters, clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        if self.is_mixed:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self.masters)


class Bench:
    """Both sides over one model and one batch."""

    def __init__(self, name: str, flags: Sequence[str], folder: Path) -> None:
        self.name, self.model = name, MODELS[name]
        places = ("--run.name=bench", f"--run.dir={folder}")
        self.config = load(ROOT / self.model.config, [*self.model.flags, *COMMON, *places, *flags], env={})
        shape = self.model.shape
        self.path = make_model(shape, folder / (shape or "demo"))
        vocab = json.loads((self.path / "config.json").read_text())["vocab_size"]
        self.batch = dialogues(self.model, vocab=min(vocab, 150_000))
        self.tokens = sum(int(np.flatnonzero(t.action_mask)[-1]) for t in self.batch)
        backend = choose_backend(self.config.learner)
        self.device = torch.device("cuda" if backend == "nccl" else "cpu")
        if self.config.learner.threads:
            torch.set_num_threads(self.config.learner.threads)
        self.ranks = Ranks.join(backend=backend, timeout_s=600)
        self.packed: Ours | None = None

    def side(self, which: str) -> Callable[[], float]:
        """Seconds of one update: of "packed" or "padded" (ours), or of "plain" on the packed micro-batches."""
        if which == "plain":
            loop = Plain(self.config, self.path, self.device)
            return lambda: self._seconds(lambda: loop.update(self._plan()))
        ours = Ours(self.config, self.path, self.ranks, layout="packed" if which == "packed" else "padded")
        if which == "packed":
            self.packed = ours
        return lambda: self._seconds(lambda: ours.update(self.batch))

    def _plan(self) -> Plan:
        if self.packed is None:  # in a process of its own: the planner needs no engine, only their device
            planner = Ppo(
                _Nothing(self.device), _Nothing(self.device), _Nothing(self.device),  # type: ignore[arg-type]
                config=self.config.learner, ranks=self.ranks, seed=0, total_updates=100, layout="packed",
            )  # fmt: skip
            return planner.prepare(self.batch, version=0).work
        return self.packed.ppo.prepare(self.batch, version=0).work

    def _seconds(self, run: Callable[[], None]) -> float:
        self._wait()
        started = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def flops(self) -> float:
        """Of the model, in one update: three forward passes and two with gradients (3 forwards each)."""
        shape = json.loads((self.path / "config.json").read_text())
        hidden, layers, inner = shape["hidden_size"], shape["num_hidden_layers"], shape["intermediate_size"]
        heads, groups = shape["num_attention_heads"], shape["num_key_value_heads"]
        size = shape.get("head_dim") or hidden // heads
        weights = layers * (2 * hidden * heads * size + 2 * hidden * groups * size + 3 * hidden * inner)
        squares = sum(int(np.flatnonzero(t.action_mask)[-1]) ** 2 for t in self.batch)
        forward = 2 * weights * self.tokens + 2 * layers * heads * size * squares  # causal: half of 4
        actions = sum(int(t.action_mask.sum()) for t in self.batch)
        return 9 * forward + 5 * 2 * hidden * shape["vocab_size"] * actions  # two of three forwards have a head


class _Nothing:
    def __init__(self, device: torch.device) -> None:
        self.device = device


def measure(name: str, flags: Sequence[str], cases: Sequence[str], *, rounds: int) -> Iterator[dict[str, Any]]:
    """The claims of one model; cases: "speed", "memory" or both."""

    def claim(case: str, ours: float, against: float, unit: str) -> dict[str, Any]:
        numbers = {
            "ours": float(f"{ours:.4g}"),
            "reference": float(f"{against:.4g}"),
            "ratio": round(ours / against, 3),
        }
        return {"benchmark": "learner", "case": f"{name}: {case}", **numbers, "unit": unit}

    with tempfile.TemporaryDirectory(prefix="bench-learner-") as folder:
        if "speed" in cases:
            yield from _speed(name, Bench(name, flags, Path(folder)), claim, rounds=rounds)
        if "memory" in cases:
            peaks = {which: _peak_mib(name, which, flags, folder) for which in SIDES}
            yield claim("peak memory against a plain loop", peaks["packed"], peaks["plain"], "MiB")
            yield claim("peak memory, packed against padded", peaks["packed"], peaks["padded"], "MiB")


def _speed(name: str, bench: Bench, claim: Callable[..., dict[str, Any]], *, rounds: int) -> Iterator[dict[str, Any]]:
    print(f"{name}: {len(bench.batch)} dialogues, {bench.tokens} tokens", flush=True)
    sides = {which: bench.side(which) for which in SIDES}
    for run in sides.values():
        run()
    times: dict[str, list[float]] = {which: [] for which in sides}
    parts: list[dict[str, float]] = []
    for _ in range(rounds):
        for which, run in sides.items():
            times[which].append(run())
            print(f"{name}: {which:6} {times[which][-1]:8.3f} s", flush=True)
            if which == "packed":
                assert bench.packed is not None
                parts.append(bench.packed.figures)
    took = {which: statistics.median(seconds) for which, seconds in times.items()}
    rate = {which: bench.tokens / seconds for which, seconds in took.items()}
    whole = statistics.median(line["update_s"] for line in parts)
    for part in STEP_PARTS:
        if f"{part}_s" in parts[0]:
            seconds = statistics.median(line[f"{part}_s"] for line in parts)
            print(f"{name}: {part:10} {seconds:8.3f} s  {seconds / whole:6.1%}")
    yield claim("a full PPO step against a plain loop", rate["packed"], rate["plain"], "tokens/s")
    yield claim("packed against padded", rate["packed"], rate["padded"], "tokens/s")
    if bench.device.type == "cuda":
        card = torch.cuda.get_device_name()
        peak = next((flops for key, flops in PEAK_FLOPS.items() if key in card), None)
        if peak:
            used = {which: bench.flops() / seconds / peak for which, seconds in took.items()}
            yield claim(f"model FLOP utilisation, {card}", used["packed"], used["plain"], "of the peak")
    bench.ranks.leave()


def _peak_mib(name: str, which: str, flags: Sequence[str], folder: str) -> float:
    command = [sys.executable, "-m", "benchmarks.learner", "--model", name, "--peak", which, "--folder", folder]
    alone = {name: value for name, value in os.environ.items() if name not in GROUP}
    done = subprocess.run([*command, *flags], cwd=ROOT, env=alone, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*MODELS, "all"], default="all")
    parser.add_argument("--cases", default="speed,memory", help="one of them, or both")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak", choices=["packed", "plain", "padded"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments, flags = parser.parse_known_args()
    if arguments.peak:
        bench = Bench(arguments.model, flags, Path(arguments.folder))
        bench.side(arguments.peak)()
        # Not getrusage's: that one is inherited from the process that started this one.
        status = Path("/proc/self/status").read_text()
        kib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
        print(torch.cuda.max_memory_allocated() / 2**20 if bench.device.type == "cuda" else kib / 1024)
        return
    names = (*ON_CPU, *(ON_GPU if torch.cuda.is_available() else ())) if arguments.model == "all" else [arguments.model]
    claims: list[dict[str, Any]] = []
    for name in names:
        claims += measure(
            name,
            [*flags, *(["--learner.device=cpu"] if name in ON_CPU else [])],
            arguments.cases.split(","),
            rounds=arguments.rounds,
        )
    for line in claims:
        print(json.dumps(line))


if __name__ == "__main__":
    main()
