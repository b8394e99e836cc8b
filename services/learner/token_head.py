"""Log-probabilities of given tokens out of hidden states, without tokens x vocabulary in fp32. Pure torch.

The logits are a matrix product in the model's dtype, a block of tokens at a time; the softmax runs in fp32 over a
slice of a block that stays in the cache. For the backward pass the logits are kept as they are, in the model's dtype,
where they fit into `keep_bytes`, and computed again otherwise. A = tokens, H = hidden size, V = vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

CPU_SLICE = 1 << 20  # elements of the softmax's fp32 slice: 4 MiB, a core's share of the cache
CUDA_SLICE = 1 << 27  # 0.5 GiB
BLOCK = 1 << 28  # logits of a block that are not kept: 0.5 GiB in bf16
KEEP_BYTES = 512 << 20  # of logits, unless the settings say otherwise


class _How(NamedTuple):
    scale: float  # 1 / temperature
    dtype: torch.dtype  # of the matrix product
    with_entropy: bool
    keep_bytes: int


class TokenHead(nn.Linear):
    """A language model's output head that can also answer with log-probabilities alone.

    in_fp32: the matrix product is in fp32 whatever the dtype of the weights; bf16 has three digits.
    """

    in_fp32 = False
    keep_bytes = KEEP_BYTES

    def forward(
        self,
        input: Tensor,
        targets: Tensor | None = None,
        temperature: float = 1.0,
        *,
        with_entropy: bool = False,
    ) -> Tensor:
        """input [A, H], targets int64 [A]: log softmax(logits / temperature)[target], fp32 [A].

        with_entropy: fp32 [2, A], the second row the entropy of the distribution that each token is from, nats.
        Without targets: the logits, [..., H] -> [..., V].
        """
        dtype = torch.float32 if self.in_fp32 else self.weight.dtype
        if targets is None:
            bias = None if self.bias is None else self.bias.to(dtype)
            return functional.linear(input.to(dtype), self.weight.to(dtype), bias)
        how = _How(1.0 / temperature, dtype, with_entropy, self.keep_bytes if torch.is_grad_enabled() else 0)
        answer: Tensor = _Logprobs.apply(input, self.weight, self.bias, targets, how)  # type: ignore[no-untyped-call]
        return answer


class _Logprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, how: _How) -> Tensor:
        answer = hidden.new_empty((2, len(targets)), dtype=torch.float32)
        logs = hidden.new_empty(len(targets), dtype=torch.float32)  # of each token's sum of exponentials
        ctx.kept = None
        for block in _blocks(targets, weight, how):
            logits = _logits(hidden[block], weight, bias, how)
            for piece in _pieces(len(logits), _slice_rows(logits)):
                at = slice(block.start + piece.start, block.start + piece.stop)
                z = logits[piece].float() * how.scale
                logs[at] = z.logsumexp(-1)
                answer[0, at] = z.gather(-1, targets[at, None]).squeeze(-1) - logs[at]
                if how.with_entropy:
                    z -= logs[at, None]
                    answer[1, at] = -(z.exp() * z).sum(-1)
            if _keeps(targets, weight, how):
                ctx.kept = logits
        ctx.how = how
        ctx.save_for_backward(hidden, weight, bias, targets, logs, answer[1].clone() if how.with_entropy else None)
        return answer if how.with_entropy else answer[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, logs, entropies = ctx.saved_tensors
        how, kept, ctx.kept = ctx.how, ctx.kept, None
        by_logprob = gradient[0] if how.with_entropy else gradient
        blocks = _blocks(targets, weight, how)
        exact = torch.float32 if len(blocks) > 1 else weight.dtype  # several blocks add up
        for_hidden = torch.zeros_like(hidden)
        for_weight = torch.zeros_like(weight, dtype=exact) if len(blocks) != 1 else None
        for_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for block in blocks:
            logits = _logits(hidden[block], weight, bias, how) if kept is None else kept
            for piece in _pieces(len(logits), _slice_rows(logits)):
                at = slice(block.start + piece.start, block.start + piece.stop)
                z = (logits[piece].float() * how.scale).sub_(logs[at, None])  # log-probabilities
                # d logprob / d z = onehot - p; d entropy / d z = -p (z + entropy)
                factor = -by_logprob[at, None]
                if how.with_entropy:
                    factor = factor - gradient[1, at, None] * (z + entropies[at, None])
                dz = z.exp_().mul_(factor).scatter_add_(-1, targets[at, None], by_logprob[at, None])
                logits[piece] = dz.mul_(how.scale)
                if for_bias is not None:
                    for_bias += dz.sum(0)
            for_hidden[block] = (logits @ weight.to(how.dtype)).to(hidden.dtype)
            part = (logits.T @ hidden[block].to(how.dtype)).to(exact)
            for_weight = part if for_weight is None else for_weight.add_(part)
        assert for_weight is not None
        for_bias = None if for_bias is None else for_bias.to(bias.dtype)
        return for_hidden, for_weight.to(weight.dtype), for_bias, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, how: _How) -> Tensor:
    return functional.linear(hidden.to(how.dtype), weight.to(how.dtype), None if bias is None else bias.to(how.dtype))


def _keeps(targets: Tensor, weight: Tensor, how: _How) -> bool:
    return len(targets) * len(weight) * how.dtype.itemsize <= how.keep_bytes


def _blocks(targets: Tensor, weight: Tensor, how: _How) -> list[slice]:
    """Tokens whose logits are computed together: all of them where they are kept."""
    rows = len(targets) if _keeps(targets, weight, how) else BLOCK // len(weight)
    return _pieces(len(targets), rows)


def _slice_rows(logits: Tensor) -> int:
    return (CUDA_SLICE if logits.is_cuda else CPU_SLICE) // logits.shape[1]


def _pieces(length: int, size: int) -> list[slice]:
    size = max(1, size)
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
