"""One learner rank for test_ppo_equalities: `python ppo_rank.py OUTPUT`.

Trains a tiny model for three updates of two optimiser steps under each of CASES; rank 0 writes weights and figures.
"""

import sys
from pathlib import Path

import msgspec
import torch
from learner_data import make_trajectory
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model

from services.contracts.config import load
from services.contracts.wire import Trajectory
from services.learner.batch import Layout
from services.learner.deepspeed_engine import Engine, WeightSource, choose_backend
from services.learner.models import Actor, Critic
from services.learner.ppo import Ppo
from services.learner.ranks import Ranks

UPDATES = 3
LAYOUTS: tuple[Layout, ...] = ("shared", "packed")
COMMON = ["batch_dialogues=12", "minibatch_dialogues=6", "kl_coef=0.1", "lr=1e-3", "critic_lr=1e-3", "device=cpu"]
CASES = {
    **{f"zero {stage}": [f"zero_stage={stage}"] for stage in range(4)},
    "one by one": ["zero_stage=0", "micro_tokens=1"],
    "all at once": ["zero_stage=0", "micro_tokens=100000"],
    "packed": ["zero_stage=0"],
    "packed, zero 3": ["zero_stage=3"],
    "shared": ["zero_stage=0"],
    "shared, zero 3": ["zero_stage=3"],
    "reference on the host": ["zero_stage=2", "reference_weights=host", "offload_activations=true"],
    "asked ahead": ["zero_stage=3"],
    "grpo": ["zero_stage=0", "advantage=grpo", "samples_per_problem=3"],
    "reinforce_pp": ["zero_stage=0", "advantage=reinforce_pp", "kl_in=reward", "kl_target=0.01"],
    "all terms": ["zero_stage=2", "clip_high=0.28", "dual_clip=3", "entropy_coef=0.01", "reward_at=attempt"],
}


def tiny(kind: type[Qwen2ForCausalLM] | type[Qwen2Model]) -> Qwen2ForCausalLM | Qwen2Model:
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
    return kind(config)


def batch(update: int) -> list[Trajectory]:
    """Twelve dialogues that begin alike; nothing can be done about the fifth."""
    dialogues = [make_trajectory(12 * update + i, attempts=1 + i % 3) for i in range(12)]
    for dialogue in dialogues:
        dialogue.token_ids[:10] = 7
    dialogues[4] = msgspec.structs.replace(dialogues[4], logprobs=dialogues[4].logprobs - 20)
    return dialogues


def run(name: str, flags: list[str], ranks: Ranks) -> dict[str, object]:
    micro = [] if any(flag.startswith("micro_tokens") for flag in flags) else ["micro_tokens=48"]
    config = load(None, [f"--learner.{flag}" for flag in (*COMMON, *micro, *flags)], env={}).learner

    def engine(module: torch.nn.Module, lr: float | None) -> Engine:
        return Engine(module, config=config, dtype=torch.float32, ranks=ranks, lr=lr)

    actor = engine(Actor(tiny(Qwen2ForCausalLM), temperature=1.0), config.lr)
    critic = engine(Critic(tiny(Qwen2Model), seed=0), config.critic_lr) if config.advantage == "gae" else None
    reference = engine(Actor(tiny(Qwen2ForCausalLM), temperature=1.0), None)
    layout = next((one for one in LAYOUTS if name.startswith(one)), "padded")
    ppo = Ppo(actor, critic, reference, config=config, ranks=ranks, seed=0, total_updates=UPDATES, layout=layout)
    figures = []
    for version in range(UPDATES):
        if name == "asked ahead":
            ppo.ask(batch(version)[2:5], version=version)
            ppo.ask(batch(version)[1:8], version=version)
        figures.append(ppo.update(batch(version), version=version))
    source = WeightSource(actor, ranks)
    if ranks.leads:
        weights = {name: tensor.clone() for name, tensor in source}
    else:
        weights = {}
        for number in range(len(source._groups)):
            ranks.await_command()
            source.gather(number)
    return {"weights": weights, "figures": figures}


def main() -> None:
    choose_backend(load(None, ["--learner.device=cpu"], env={}).learner)
    torch.set_num_threads(1)
    ranks = Ranks.join(backend="gloo", timeout_s=60)
    found = {name: run(name, flags, ranks) for name, flags in CASES.items()}
    if ranks.leads:
        torch.save(found, Path(sys.argv[1]))
    ranks.leave()


if __name__ == "__main__":
    main()
