"""Adam's direction against PyTorch's own."""

from __future__ import annotations

import torch

from attnctrl.adam import Moments


def test_it_moves_as_adam() -> None:
    gradients = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 10.0])
    theirs = torch.zeros(3, 2, requires_grad=True)
    optimiser = torch.optim.Adam([theirs], lr=0.1)
    ours, moments = torch.zeros(3, 2), Moments()
    for gradient in gradients:
        theirs.grad = gradient.clone()
        optimiser.step()
        ours = ours - 0.1 * moments.move(gradient)
        torch.testing.assert_close(ours, theirs.detach())
    assert moments.count == 5


def test_the_first_move_has_the_size_of_the_rate() -> None:
    moved = Moments().move(torch.tensor([1e-3, -50.0]))
    torch.testing.assert_close(moved, torch.tensor([1.0, -1.0]), atol=1e-4, rtol=0)
