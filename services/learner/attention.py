"""Attention over dialogues that lie behind one another in one row, each seeing only itself. For transformers' models.

Registered under NAME with transformers, whose models hand `rows` down to it. On GPUs in half precision it is one call
of flash attention's kernel for variable lengths, which is part of torch; elsewhere torch's kernel runs over each
dialogue by itself. Without `rows`, of one dialogue each, it is what transformers would do.
"""

import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "dialogues"
_HALF = (torch.bfloat16, torch.float16)


class Rows(NamedTuple):
    """Where the dialogues of a row lie."""

    lengths: list[int]
    offsets: Tensor  # int32 [S + 1], on the device: where each begins, and the end


def rows_at(offsets: Tensor, device: torch.device) -> dict[str, Any]:
    """What a transformers model is to be called with for dialogues that begin at `offsets`, int32 CPU [S + 1]."""
    lengths = offsets.diff()
    positions = torch.arange(int(offsets[-1])) - torch.repeat_interleave(offsets[:-1], lengths)
    rows = Rows(lengths.tolist(), offsets.to(device, non_blocking=True))
    return {"position_ids": positions.unsqueeze(0).to(device, non_blocking=True), "rows": rows}


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """query [B, heads, T, D], key and value [B, key heads, T, D]; `rows` needs B = 1. Returns [B, T, heads, D]."""
    rows: Rows | None = settings.pop("rows", None)
    if rows is None:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
        return output, None
    scale: float | None = settings.get("scaling")
    if query.is_cuda and query.dtype in _HALF:
        return _flash(query, key, value, rows, scale), None
    is_grouped = query.shape[1] != key.shape[1]
    parts = [
        functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=is_grouped)
        for q, k, v in zip(*(torch.split(x, rows.lengths, 2) for x in (query, key, value)), strict=True)
    ]
    return torch.cat(parts, 2).transpose(1, 2), None


def _flash(query: Tensor, key: Tensor, value: Tensor, rows: Rows, scale: float | None) -> Tensor:
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # [T, heads, D]
    longest = max(rows.lengths)
    output: Tensor = _kernel()(q, k, v, rows.offsets, rows.offsets, longest, longest, scale=scale, window_size=(-1, 0))
    return output.unsqueeze(0)


@cache
def _kernel() -> Callable[..., Any]:
    from torch.nn.attention.varlen import varlen_attn

    kernel: Callable[..., Any] = varlen_attn
    has_to_be_told = "enable_gqa" in inspect.signature(varlen_attn).parameters  # since torch 2.12
    return partial(kernel, enable_gqa=True) if has_to_be_told else kernel


AttentionInterface.register(NAME, attend)
