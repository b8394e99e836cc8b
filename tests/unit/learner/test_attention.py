"""Dialogues packed into one row: each sees only itself, and losses and gradients are the padded layout's."""

import msgspec
import numpy as np
import pytest
import torch
from learner_data import make_trajectory
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
)

from services.contracts.wire import Trajectory
from services.learner.batch import Blocks, Layout, MicroBatch, bins, plan
from services.learner.first_pass import inputs, where
from services.learner.models import Actor, Critic, can_pack

SHAPE = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}


def make(kind: type[PreTrainedModel], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    configs = {Qwen2ForCausalLM: Qwen2Config, Qwen2Model: Qwen2Config, LlamaForCausalLM: LlamaConfig}
    return kind(configs[kind](**SHAPE, **HEADS, initializer_range=0.2)).to(dtype)  # type: ignore[no-any-return]


def blocks(layout: Layout, *, micro_tokens: int = 64) -> list[MicroBatch]:
    batch = alike(11)
    work = plan(batch, parts=[np.arange(11)], rank=0, world=1, blocks=Blocks(layout, micro_tokens, 64))
    return work.shares[0].micros


def alike(count: int) -> list[Trajectory]:
    """Dialogues that begin alike: some part sooner or later, some are the beginning of others, some are the same."""
    longest = make_trajectory(0, attempts=9)
    found = []
    for i in range(count):
        end = longest.attempts[2 + 3 * (i % 3)].end
        ids = longest.token_ids[:end].copy()
        ids[9 + i % 5 :] += i // 3 % 3
        there = {"token_ids": ids, "action_mask": longest.action_mask[:end], "logprobs": longest.logprobs[:end]}
        found.append(msgspec.structs.replace(longest, task_id=i, **there))
    return found


def loss_and_gradients(model: Actor | Critic, micros: list[MicroBatch]) -> tuple[float, list[torch.Tensor]]:
    """A weighted sum that treats every action differently."""
    total = torch.zeros((), dtype=torch.float64)
    for micro in micros:
        ids, positions, targets = inputs(micro, torch.device("cpu"))
        tokens = (ids, positions, targets) if isinstance(model, Actor) else (ids, positions)
        weights = torch.sin(torch.from_numpy(micro.flat).double() + 1)
        total = total + (model(*tokens, **where(micro)).double() * weights).sum()
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    assert [n for n, g in zip(names, gradients, strict=True) if g is None] == []
    return total.item(), list(gradients)


@pytest.mark.parametrize("kind", [Qwen2ForCausalLM, LlamaForCausalLM, Qwen2Model])
@pytest.mark.parametrize("micro_tokens", [1, 64, 10_000])
@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_one_row_equals_padded_rows(kind: type[PreTrainedModel], micro_tokens: int, layout: Layout) -> None:
    backbone = make(kind)
    model = Critic(backbone, seed=0) if kind is Qwen2Model else Actor(backbone, temperature=0.7)
    loss, gradients = loss_and_gradients(model, blocks("padded"))
    rows = blocks(layout, micro_tokens=micro_tokens)
    assert all(len(micro.input_ids) == 1 for micro in rows)
    row_loss, row_gradients = loss_and_gradients(model, rows)
    assert row_loss == pytest.approx(loss, rel=1e-6, abs=1e-6)
    for row, padded in zip(row_gradients, gradients, strict=True):  # sums in another order
        torch.testing.assert_close(row, padded, rtol=0, atol=1e-5 * float(padded.abs().max()))


def test_what_dialogues_share_is_computed_once() -> None:
    (packed,), (shared,) = (blocks(layout, micro_tokens=10_000) for layout in ("packed", "shared"))
    assert shared.parents is not None and shared.parents.max() > 0  # a tree of several levels
    assert shared.input_ids.size < 2 / 3 * packed.input_ids.size
    assert shared.num_actions == packed.num_actions


@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_one_row_is_the_same_where_activations_are_computed_again(layout: Layout) -> None:
    model = Actor(make(Qwen2ForCausalLM), temperature=1.0).train()
    loss, gradients = loss_and_gradients(model, blocks(layout))
    model.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again, same = loss_and_gradients(model, blocks(layout))
    assert again == pytest.approx(loss, rel=1e-9)
    torch.testing.assert_close(same, gradients, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_without_its_neighbours_a_dialogue_says_the_same(layout: Layout) -> None:
    model = Actor(make(Qwen2ForCausalLM), temperature=1.0)
    (together,) = blocks(layout, micro_tokens=10_000)
    with torch.no_grad():
        every = model(*inputs(together, torch.device("cpu")), **where(together))
        for alone in blocks(layout, micro_tokens=1):
            answer = model(*inputs(alone, torch.device("cpu")), **where(alone))
            torch.testing.assert_close(answer, every[np.isin(together.flat, alone.flat)], rtol=1e-5, atol=1e-5)


def test_models_whose_layers_look_at_a_window_are_not_packed() -> None:
    windowed = MistralForCausalLM(MistralConfig(**SHAPE, **HEADS, sliding_window=4))
    assert not can_pack(Actor(windowed, temperature=1.0))
    assert can_pack(Actor(make(Qwen2ForCausalLM), temperature=1.0))


def test_bins_hold_every_dialogue_once_within_their_tokens_and_waste_little() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 200)
    lengths[7] = 500
    found = bins(np.arange(200), lengths, micro_tokens=256)
    assert sorted(i for one in found for i in one.tolist()) == list(range(200))
    totals = [int(lengths[one].sum()) for one in found]
    assert [total for total in totals if total > 256] == [500]
    assert len(found) - 1 <= 1.05 * (lengths.sum() - 500) / 256 + 1
