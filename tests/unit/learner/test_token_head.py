"""Log-probabilities in blocks and slices are those of the naive softmax, with its gradients, in a bounded memory."""

import pytest
import torch
from learner_data import logprobs_and_entropy, logprobs_from_logits

from services.learner import token_head
from services.learner.token_head import TokenHead

VOCAB, HIDDEN, TOKENS = 97, 16, 37


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_head, "BLOCK", 10 * VOCAB)
    monkeypatch.setattr(token_head, "CPU_SLICE", 3 * VOCAB)


def make(dtype: torch.dtype) -> tuple[TokenHead, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Head, hidden states, targets, weights of a loss."""
    random = torch.Generator().manual_seed(0)
    head = TokenHead(HIDDEN, VOCAB)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random))
    hidden = torch.randn(TOKENS, HIDDEN, generator=random).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=random)
    return head.to(dtype), hidden, targets, torch.randn(2, TOKENS, generator=random)


def test_logprobs_are_those_of_the_tempered_softmax() -> None:
    head, hidden, targets, _ = make(torch.float32)
    every = torch.log_softmax(head(hidden).double() / 0.7, dim=-1)
    expected = every[torch.arange(TOKENS), targets]
    both = head(hidden, targets, 0.7, with_entropy=True).double()
    torch.testing.assert_close(both[0], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(both[1], torch.distributions.Categorical(logits=every).entropy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("keep_bytes", [0, 1 << 30], ids=["computed again", "kept"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
def test_values_and_gradients_are_the_naive_ones(
    dtype: torch.dtype, tolerance: float, keep_bytes: int, with_entropy: bool
) -> None:
    head, hidden, targets, weights = make(dtype)
    head.keep_bytes = keep_bytes
    weights = weights if with_entropy else weights[0]
    naive = (logprobs_and_entropy if with_entropy else logprobs_from_logits)(head(hidden), targets, 0.7)
    expected = torch.autograd.grad((naive * weights).sum(), [hidden, *head.parameters()])
    found = head(hidden, targets, 0.7, with_entropy=with_entropy)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, naive, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad((found * weights).sum(), [hidden, *head.parameters()])
    for ours, theirs in zip(gradients, expected, strict=True):
        assert ours.dtype is dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * float(theirs.abs().max()))


def test_without_gradients_nothing_is_kept_and_the_values_are_the_same() -> None:
    head, hidden, targets, _ = make(torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(head(hidden, targets), logprobs_from_logits(head(hidden), targets, 1.0))


class PeakMemory(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest fp32 tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype is torch.float32 and tensor._base is None:
                PeakMemory.largest = max(PeakMemory.largest, tensor.numel())
        return out


@pytest.mark.parametrize("keep_bytes", [0, 1 << 30])
def test_no_fp32_tensor_is_as_large_as_tokens_times_vocabulary(keep_bytes: int) -> None:
    head, hidden, targets, _ = make(torch.bfloat16)
    head.keep_bytes = keep_bytes
    PeakMemory.largest = 0
    with torch.autograd.set_multithreading_enabled(False), PeakMemory():
        head(hidden, targets, 0.7).sum().backward()
    assert 3 * VOCAB <= PeakMemory.largest <= max(3 * VOCAB, HIDDEN * VOCAB) < TOKENS * VOCAB
