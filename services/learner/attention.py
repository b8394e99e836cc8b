"""Attention over dialogues that lie behind one another in one row, each seeing only itself. For transformers' models.

Registered under NAME with transformers, whose models hand `rows` down to it. On GPUs in half precision it is one call
of flash attention's kernel for variable lengths, which is part of torch; elsewhere torch's kernel runs over each
segment by itself: a dialogue, or a piece of one that sees what goes before it too (`prefixes`). Without `rows`, of one
dialogue each, it is what transformers would do.
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
    """Where the segments of a row lie."""

    lengths: list[int]
    offsets: Tensor  # int32 [S + 1], on the device: where each begins, and the end
    parents: list[int]  # [S]: the segment before each; -1: none
    masks: list[Tensor | None]  # [S]: of one with a parent, bool: at which of those and its own tokens each looks


def rows_at(offsets: Tensor, device: torch.device, parents: Tensor | None = None) -> dict[str, Any]:
    """What a transformers model is to be called with for segments that begin at `offsets`, int32 CPU [S + 1].

    parents: int32 CPU [S], the segment before each, or -1; None: each is a dialogue.
    """
    lengths: list[int] = offsets.diff().tolist()
    before = [-1] * len(lengths) if parents is None else parents.tolist()
    starts: list[int] = []  # of each in its dialogue
    for parent in before:
        starts.append(0 if parent < 0 else starts[parent] + lengths[parent])
    positions = torch.cat([torch.arange(length) + start for start, length in zip(starts, lengths, strict=True)])
    masks = [_mask(start, length, device) if start else None for start, length in zip(starts, lengths, strict=True)]
    rows = Rows(lengths, offsets.to(device, non_blocking=True), before, masks)
    return {"position_ids": positions.unsqueeze(0).to(device, non_blocking=True), "rows": rows}


def _mask(start: int, length: int, device: torch.device) -> Tensor:
    """Causal, of tokens with `start` others before them: bool [length, start + length]."""
    return torch.ones(length, start + length, dtype=torch.bool, device=device).tril(start)


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
    keys, values = _with_parents(key, rows), _with_parents(value, rows)
    parts = [
        functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=is_grouped
        )
        for q, k, v, mask in zip(torch.split(query, rows.lengths, 2), keys, values, rows.masks, strict=True)
    ]
    return torch.cat(parts, 2).transpose(1, 2), None


def _with_parents(x: Tensor, rows: Rows) -> list[Tensor]:
    """Of each segment, those before it and its own: [B, heads, T', D]."""
    found: list[Tensor] = []
    for own, parent in zip(torch.split(x, rows.lengths, 2), rows.parents, strict=True):
        found.append(own if parent < 0 else torch.cat((found[parent], own), 2))
    return found


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
