"""Actor, critic and reference as torch modules. How they are trained and spread over ranks is `deepspeed_engine`'s.

All take right-padded ids without an attention mask: under causal attention no real position sees the padding, and
the attention kernels take their fast path.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from services.contracts.config import ConfigError
from services.learner.losses import logprobs_from_hidden

# A head that does more than a matrix product; vLLM applies these, so leaving them out would be silently wrong.
_HEAD_EXTRAS = {"final_logit_softcapping": None, "logit_scale": None, "logits_scaling": 1.0}


class Fp32Linear(nn.Linear):
    """A linear layer that computes in fp32 whatever the dtype of its weights: bf16 has three digits."""

    def forward(self, input: Tensor) -> Tensor:
        """input [..., in] any float dtype. Returns fp32 [..., out]."""
        bias = None if self.bias is None else self.bias.float()
        return functional.linear(input.float(), self.weight.float(), bias)


class Actor(nn.Module):
    """A causal language model that answers with the log-probabilities of given tokens."""

    def __init__(self, model: PreTrainedModel, *, temperature: float) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.vocab_size = int(model.config.get_text_config().vocab_size)

    def forward(self, input_ids: Tensor, positions: Tensor, targets: Tensor, with_entropy: bool = False) -> Tensor:  # noqa: FBT001, FBT002 - DeepSpeed passes positions
        """input_ids [B, T], positions [A] in the flattened [B * T], targets [A], all int64. Returns fp32 [A].

        with_entropy: fp32 [2, A], the second row the entropy of the distribution that each token is from.
        """
        hidden = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        chosen = hidden.flatten(0, 1).index_select(0, positions)
        head: nn.Module = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        return logprobs_from_hidden(
            chosen, head, targets, self.temperature, vocab_size=self.vocab_size, with_entropy=with_entropy
        )


class Critic(nn.Module):
    """The same backbone with a linear value head: bias-free, weights drawn from N(0, std 1 / (hidden + 1))."""

    def __init__(self, backbone: PreTrainedModel, *, seed: int) -> None:
        super().__init__()
        self.backbone = backbone
        hidden = int(backbone.config.get_text_config().hidden_size)
        self.head = Fp32Linear(hidden, 1, bias=False, dtype=backbone.dtype)
        with torch.no_grad():
            drawn = torch.randn(1, hidden, generator=torch.Generator().manual_seed(seed & (2**63 - 1)))
            self.head.weight.copy_(drawn / (hidden + 1))

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """input_ids [B, T], positions [A] int64: the value before the token that follows each. Returns fp32 [A]."""
        hidden = self.backbone(input_ids=input_ids, use_cache=False).last_hidden_state
        value: Tensor = self.head(hidden.flatten(0, 1).index_select(0, positions))
        return value.squeeze(-1)


def check_model(path: Path) -> None:
    """Raise ConfigError, one line, unless `path` looks like a Hugging Face model folder. Cheap: reads no weights."""
    if not (path / "config.json").is_file():
        raise ConfigError(f"model.path: {path}: no config.json there; not a Hugging Face model folder")


def load_actor(
    path: Path,
    *,
    dtype: torch.dtype,
    temperature: float,
    gradient_checkpointing: bool = False,
    fp32_head: bool = False,
) -> Actor:
    """The policy, or the frozen reference. fp32_head: logits are computed in fp32. Raises ConfigError."""
    model = _load(AutoModelForCausalLM, path, dtype)
    for name, harmless in _HEAD_EXTRAS.items():
        if (value := getattr(model.config.get_text_config(), name, harmless)) != harmless:
            raise ConfigError(f"model.path: {path}: {name} = {value} in config.json: such output heads are unsupported")
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if fp32_head:
        head = _in_fp32(path, model.get_output_embeddings())  # type: ignore[no-untyped-call]
        model.set_output_embeddings(head)  # type: ignore[no-untyped-call]
    return Actor(model, temperature=temperature)


def _in_fp32(path: Path, head: nn.Module) -> Fp32Linear:
    """The same head over the same parameters, tied or not."""
    if type(head) is not nn.Linear:
        raise ConfigError(f"model.fp32_head: the output head of {path} is a {type(head).__name__}, not a linear layer")
    same = Fp32Linear(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
    same.weight, same.bias = head.weight, head.bias
    return same


def load_critic(path: Path, *, dtype: torch.dtype, seed: int, gradient_checkpointing: bool = False) -> Critic:
    """The critic at its start: the policy's backbone and a fresh head. Raises ConfigError."""
    backbone = _load(AutoModel, path, dtype)
    if gradient_checkpointing:
        backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Critic(backbone, seed=seed)


def _load(kind: Any, path: Path, dtype: torch.dtype) -> PreTrainedModel:
    check_model(path)
    try:
        config = AutoConfig.from_pretrained(path)
        for name, value in config.to_dict().items():
            # Dropout would make the old and the new log-probabilities differ by chance.
            if "dropout" in name and isinstance(value, float):
                setattr(config, name, 0.0)
        model: PreTrainedModel = kind.from_pretrained(path, config=config, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path: {path}: cannot load the model: {str(error).splitlines()[0]}") from error
    return model
