"""The heads in fp32: what they compute, and that their parameters stay the model's own."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from services.learner.models import Actor, Fp32Linear, load_actor, load_critic


def make_model(folder: Path, *, tied: bool) -> Path:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def logprobs(actor: Actor) -> torch.Tensor:
    ids = torch.arange(40)[None] % 97
    answer: torch.Tensor = actor(ids, torch.arange(39), ids[0, 1:])
    return answer


@pytest.mark.parametrize("tied", [True, False])
def test_an_fp32_head_rounds_no_logit_and_keeps_its_parameters(tmp_path: Path, tied: bool) -> None:
    path = make_model(tmp_path, tied=tied)
    plain = load_actor(path, dtype=torch.bfloat16, temperature=1.0)
    fine = load_actor(path, dtype=torch.bfloat16, temperature=1.0, fp32_head=True)
    assert [(n, p.dtype) for n, p in fine.named_parameters()] == [(n, p.dtype) for n, p in plain.named_parameters()]
    ids = torch.arange(40)[None] % 97
    hidden = fine.model.base_model(input_ids=ids).last_hidden_state.double()[0, :-1]
    head = dict(fine.model.named_parameters())["model.embed_tokens.weight" if tied else "lm_head.weight"]
    exact = torch.log_softmax(hidden @ head.double().T, -1)
    exact = exact.gather(-1, ids[0, 1:, None]).squeeze(-1).detach()
    torch.testing.assert_close(logprobs(fine).double(), exact, rtol=0, atol=1e-5)
    assert float((logprobs(plain).detach() - exact).abs().max()) > 1e-3
    gradients = torch.autograd.grad(logprobs(fine).sum(), [*fine.parameters()])
    assert all(g.dtype is torch.bfloat16 and bool(g.isfinite().all()) for g in gradients)


def test_values_are_computed_in_fp32(tmp_path: Path) -> None:
    critic = load_critic(make_model(tmp_path, tied=True), dtype=torch.bfloat16, seed=0)
    assert isinstance(critic.head, Fp32Linear) and critic.head.weight.dtype is torch.bfloat16
    values = critic(torch.arange(9)[None], torch.arange(9))
    assert values.dtype is torch.float32 and not torch.equal(values, values.bfloat16().float())
