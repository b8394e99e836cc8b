"""Activations that waited elsewhere come back as they were."""

import pytest
import torch

from services.learner.offload import offloaded_activations


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_the_same(recompute: bool) -> None:
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()) for _ in range(3))
    inputs, moved = torch.randn(5, 8), []

    def loss() -> torch.Tensor:
        hidden = inputs
        for layer in layers:
            if recompute:
                hidden = torch.utils.checkpoint.checkpoint(layer, hidden, use_reentrant=False)
            else:
                hidden = layer(hidden)
        return hidden.square().sum()

    expected = torch.autograd.grad(loss(), [*layers.parameters()])
    real = torch.empty
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", lambda *args, **flags: moved.append(args[0]) or real(*args, **flags))
        with offloaded_activations(min_bytes=0):
            found = loss()
    torch.testing.assert_close(torch.autograd.grad(found, [*layers.parameters()]), expected, rtol=0, atol=0)
    assert moved and torch.Size((8, 8)) not in moved  # activations went, no weight did
