"""Actor, critic and reference as torch modules. How they are trained and spread over ranks is `deepspeed_engine`'s.

All take ids without an attention mask: one row of segments that begin at `offsets`, each a dialogue or, with `parents`,
what follows another segment in one; or right-padded rows, one of each dialogue, where under causal attention no real
position sees the padding.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from services.contracts.config import ConfigError
from services.learner.attention import NAME, rows_at
from services.learner.token_head import KEEP_BYTES, TokenHead

# A head that does more than a matrix product; vLLM applies these, so leaving them out would be silently wrong.
_HEAD_EXTRAS = {"final_logit_softcapping": None, "logit_scale": None, "logits_scaling": 1.0}


class Fp32Linear(nn.Linear):
    """A linear layer that computes in fp32 whatever the dtype of its weights: bf16 has three digits."""

    def forward(self, input: Tensor) -> Tensor:
        """input [..., in] any float dtype. Returns fp32 [..., out]."""
        bias = None if self.bias is None else self.bias.float()
        return functional.linear(input.float(), self.weight.float(), bias)


class Actor(nn.Module):
    """A causal language model that answers with the log-probabilities of given tokens.

    fp32_head: logits are computed in fp32. keep_bytes: of logits that wait for the backward pass; what is more is
    computed again. Raises ConfigError when the model's output head is not a matrix product.
    """

    def __init__(
        self, model: PreTrainedModel, *, temperature: float, fp32_head: bool = False, keep_bytes: int = KEEP_BYTES
    ) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature
        head = _token_head(model)
        head.in_fp32, head.keep_bytes = fp32_head, keep_bytes
        _attend_by_dialogue(model)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        targets: Tensor,
        with_entropy: bool = False,  # noqa: FBT001, FBT002 - DeepSpeed passes positions
        *,
        offsets: Tensor | None = None,
        parents: Tensor | None = None,
    ) -> Tensor:
        """input_ids [B, T], positions [A] in the flattened [B * T], targets [A], all int64. Returns fp32 [A].

        with_entropy: fp32 [2, A], the second row the entropy of the distribution that each token is from. offsets:
        int32 CPU [S + 1], where each of the segments in the one row begins, and its end. parents: int32 CPU [S], the
        segment before each, or -1.
        """
        hidden = _hidden(self.model.base_model, input_ids, positions, offsets, parents)
        head: TokenHead = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        answer: Tensor = head(hidden, targets, self.temperature, with_entropy=with_entropy)
        return answer


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
        _attend_by_dialogue(backbone)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        *,
        offsets: Tensor | None = None,
        parents: Tensor | None = None,
    ) -> Tensor:
        """As the actor's: the value before the token that follows each position. Returns fp32 [A]."""
        value: Tensor = self.head(_hidden(self.backbone, input_ids, positions, offsets, parents))
        return value.squeeze(-1)


def _hidden(
    backbone: nn.Module, input_ids: Tensor, positions: Tensor, offsets: Tensor | None, parents: Tensor | None
) -> Tensor:
    """Hidden states at the positions: [A, H]."""
    rows = {} if offsets is None else rows_at(offsets, input_ids.device, parents)
    hidden: Tensor = backbone(input_ids=input_ids, use_cache=False, **rows).last_hidden_state
    return hidden.flatten(0, 1).index_select(0, positions)


def can_pack(model: Actor) -> bool:
    """Whether its dialogues may share a row."""
    return bool(model.model.config._attn_implementation == NAME)


def _attend_by_dialogue(model: PreTrainedModel) -> None:
    """Let dialogues share a row, unless layers look at a window or do anything but attend."""
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    is_windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if model._supports_attention_backend and layers == {"full_attention"} and not is_windowed:
        model.set_attn_implementation(NAME)


def _token_head(model: PreTrainedModel) -> TokenHead:
    """The model's output head, exchanged for one over the same parameters, tied or not."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if type(head) is not nn.Linear:
        raise ConfigError(f"model.path: the model's output head is a {type(head).__name__}: only linear ones will do")
    same = TokenHead(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
    same.weight, same.bias = head.weight, head.bias
    model.set_output_embeddings(same)  # type: ignore[no-untyped-call]
    return same


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
    keep_bytes: int = KEEP_BYTES,
) -> Actor:
    """The policy, or the frozen reference; see `Actor`. Raises ConfigError."""
    model = _load(AutoModelForCausalLM, path, dtype)
    for name, harmless in _HEAD_EXTRAS.items():
        if (value := getattr(model.config.get_text_config(), name, harmless)) != harmless:
            raise ConfigError(f"model.path: {path}: {name} = {value} in config.json: such output heads are unsupported")
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Actor(model, temperature=temperature, fp32_head=fp32_head, keep_bytes=keep_bytes)


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
