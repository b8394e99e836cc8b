"""DeepSpeed against plain torch, ranks against one another, resumed against uninterrupted. Real processes."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from learner_data import make_trajectory
from ranks import RankProcesses
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from services.contracts.config import RunConfig, load, to_toml_dict
from services.learner.advantage import gae, moments, whiten
from services.learner.arithmetic_model import build_tokenizer
from services.learner.batch import pack
from services.learner.kl import kl
from services.learner.losses import importance_weights, policy_loss_sum, value_loss_sum
from services.learner.models import load_actor, load_critic
from services.learner.schedule import lr_at

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=304,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def make_run(tmp_path: Path, model: Path, *flags: str) -> RunConfig:
    base = [
        *("--run.dir", str(tmp_path), "--run.name", "run", "--run.steps", "4", "--model.dtype", "float32"),
        *("--learner.batch_dialogues", "12", "--learner.minibatch_dialogues", "6", "--learner.micro_tokens", "48"),
        *("--learner.lr", "1e-3", "--learner.critic_lr", "1e-3", "--learner.lr_warmup", "0.25"),
        *("--learner.weight_decay", "0.1", "--learner.kl_coef", "0.1", "--learner.grad_clip", "0.1"),
        *("--learner.device", "cpu", "--learner.threads", "1"),
    ]
    config = load(None, [*base, *flags], env={})
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / "config.json").write_text(json.dumps(to_toml_dict(config)))
    (config.run_dir / "model.json").write_text(json.dumps({"path": str(model)}))
    return config


class Result(NamedTuple):
    weights: dict[str, torch.Tensor]
    figures: list[dict[str, float]]


def train(config: RunConfig, *, updates: int, world: int = 1, mode: str = "fresh") -> Result:
    """Run `updates` updates in `world` processes."""
    output = config.run_dir / f"{mode}-{updates}"
    RankProcesses("learner_rank.py", [str(config.run_dir), str(output), str(updates), mode], world=world).finish()
    figures = json.loads((output / "metrics.json").read_text())["figures"]
    return Result(torch.load(output / "actor.pt", weights_only=True), figures)


def train_plainly(config: RunConfig, model: Path) -> dict[str, torch.Tensor]:
    """The first update with torch alone: one dialogue at a time, no padding, no DeepSpeed."""
    learner = config.learner
    actor = load_actor(model, dtype=torch.float32, temperature=1.0)
    reference = load_actor(model, dtype=torch.float32, temperature=1.0)
    critic = load_critic(model, dtype=torch.float32, seed=config.run.seed)
    trajectories = [make_trajectory(i, attempts=1 + i % 3) for i in range(learner.batch_dialogues)]
    packed = pack(trajectories)

    def inputs(i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return (
            torch.from_numpy(packed.inputs[i])[None],
            torch.from_numpy(packed.predicts[i]),
            torch.from_numpy(packed.targets[i]),
        )

    with torch.no_grad():
        old = [actor(*inputs(i)) for i in range(len(trajectories))]
        fixed = [reference(*inputs(i)) for i in range(len(trajectories))]
        values = [critic(*inputs(i)[:2]) for i in range(len(trajectories))]
    raw, returns = gae(packed.rewards, torch.cat(values).numpy(), packed.offsets, gamma=1.0, lam=0.99)
    advantages = whiten(raw, moments(raw))
    cut = packed.offsets[1:-1]
    behaviour = [torch.from_numpy(part) for part in np.split(packed.behaviour, cut)]
    advantage = [torch.from_numpy(part) for part in np.split(advantages, cut)]
    target = [torch.from_numpy(part.astype(np.float32)) for part in np.split(returns, cut)]
    options: dict[str, Any] = {"betas": learner.betas, "weight_decay": learner.weight_decay}
    optimisers = [torch.optim.AdamW(m.parameters(), lr=1e-3, **options) for m in (actor, critic)]
    tokens = sum(len(part) for part in packed.targets)
    policy = sum(
        policy_loss_sum(logprobs, o, importance_weights(o, b, 2.0), a, clip_low=0.2, clip_high=0.2).loss
        + 0.1 * kl(logprobs, f).sum()
        for logprobs, o, b, a, f in (
            (actor(*inputs(i)), old[i], behaviour[i], advantage[i], fixed[i]) for i in range(len(old))
        )
    )
    value = sum(value_loss_sum(critic(*inputs(i)[:2]), values[i], target[i], clip=0.2).loss for i in range(len(old)))
    rate = lr_at(0, total=config.run.steps, peak=1e-3, warmup=0.25, min_ratio=0.1)
    for module, loss, optimiser in zip((actor, critic), (policy, value), optimisers, strict=True):
        (loss / tokens).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), learner.grad_clip)
        optimiser.param_groups[0]["lr"] = rate
        optimiser.step()
    return {name.removeprefix("model."): p.detach() for name, p in actor.named_parameters()}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float) -> None:
    assert sorted(ours) == sorted(theirs)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("stage", "world"), [(0, 1), (2, 1), (0, 2), (2, 2), (3, 2)])
def test_one_step_equals_plain_adamw_on_the_whole_minibatch(
    tmp_path: Path, model: Path, stage: int, world: int
) -> None:
    config = make_run(tmp_path, model, "--learner.zero_stage", str(stage), "--learner.minibatch_dialogues", "12")
    ours = train(config, updates=1, world=world)
    theirs = train_plainly(config, model)
    before = {name: p for name, p in AutoModelForCausalLM.from_pretrained(model).named_parameters()}
    assert max(float((theirs[name] - before[name]).detach().abs().max()) for name in theirs) > 5e-4  # it did move
    assert_same(ours.weights, theirs, 2e-5)  # a step of Adam is about 1e-3


@pytest.mark.parametrize(("stage", "dtype"), [(0, "float32"), (1, "bfloat16"), (2, "float32")])
def test_resumed_equals_uninterrupted_and_the_export_loads(tmp_path: Path, model: Path, stage: int, dtype: str) -> None:
    flags = ("--learner.zero_stage", str(stage), "--model.dtype", dtype)
    whole = train(make_run(tmp_path / "a", model, *flags), updates=2)
    config = make_run(tmp_path / "b", model, *flags)
    first = train(config, updates=1)
    second = train(config, updates=1, mode="resume")
    assert_same(second.weights, whole.weights, 0.0)
    for name in ("policy_loss", "value_loss", "kl_ref", "grad_norm", "lr"):
        assert [first.figures[0][name], second.figures[0][name]] == [f[name] for f in whole.figures]
    folder = config.run_dir / "checkpoints" / "v00000002" / "hf"
    assert_same(load_file(folder / "model.safetensors"), second.weights, 0.0)
    exported = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(exported.get_output_embeddings().weight, second.weights["model.embed_tokens.weight"])
