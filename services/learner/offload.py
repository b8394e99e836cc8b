"""Activations in host memory while they wait for the backward pass."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

MIN_BYTES = 1 << 20  # smaller ones stay: there is nothing to gain

_Kept = Tensor | tuple[torch.device, Tensor]


def offloaded_activations(*, min_bytes: int = MIN_BYTES) -> Any:
    """Context: what is saved for the backward pass goes to (pinned) host memory and comes back when it is needed.

    Parameters stay where they are. With gradient checkpointing what goes is each layer's input. Copies run in the
    stream of the computation, so no tensor is reused under them.
    """

    def pack(tensor: Tensor) -> _Kept:
        source = tensor if tensor._base is None else tensor._base
        if isinstance(source, torch.nn.Parameter) or tensor.numel() * tensor.element_size() < min_bytes:
            return tensor
        there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return tensor.device, there.copy_(tensor, non_blocking=True)

    def unpack(kept: _Kept) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept[1].to(kept[0], non_blocking=True)

    return saved_tensors_hooks(pack, unpack)
