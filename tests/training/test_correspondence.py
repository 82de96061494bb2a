"""What a picture and its references see of each other."""

from __future__ import annotations

import math

import pytest
import torch

from attnctrl.training import coordinates, flow_field, flow_loss, reach, warped
from tests.training.material import check_gradient


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_coordinates() -> None:
    assert coordinates(2, 3).tolist() == [[-1, -1], [0, -1], [1, -1], [-1, 1], [0, 1], [1, 1]]


def test_a_flow_that_is_the_identity() -> None:
    """One-hot queries and keys: each token looks at its own place, and the warp changes nothing at any size."""
    states = 40 * torch.eye(6)[None, None].expand(1, 2, -1, -1)
    flow = flow_field(states, states, (2, 3), scale=1.0)
    assert torch.allclose(flow[0], coordinates(2, 3), atol=1e-6)
    picture = noise(1, 3, 8, 12)
    assert torch.allclose(warped(picture, flow.view(1, 2, 3, 2), 8, 12), picture, atol=1e-5)
    whole = flow_loss(flow.view(1, 2, 3, 2), picture, picture, torch.ones(1, 8, 12), None)
    assert whole.item() == pytest.approx(0, abs=1e-9)


def test_a_flow_to_the_middle_and_one_by_hand() -> None:
    blind = flow_field(torch.zeros(1, 1, 4, 3), noise(1, 1, 15, 3), (3, 5), scale=1.0)
    assert torch.allclose(blind, torch.zeros(1, 4, 2), atol=1e-6)
    picture = noise(1, 3, 7, 7)
    centre = warped(picture, blind.view(1, 2, 2, 2), 7, 7)
    assert torch.allclose(centre, picture[:, :, 3:4, 3:4].expand_as(picture), atol=1e-5)
    # Weights .25 and .75 of two places: x = -.25 + .75. The temperature halves the logits.
    query, key = torch.tensor([[[[1.0]]]]), torch.tensor([[[[0.0], [2 * math.log(3)]]]])
    assert torch.allclose(flow_field(query, key, (1, 2), scale=1.0)[0, 0, 0], torch.tensor(0.5), atol=1e-6)
    assert flow_field(query, key, (1, 2), 1.0, temperature=1.0)[0, 0, 0].item() == pytest.approx(0.8)


def test_the_flow_loss() -> None:
    flow = (0.9 * coordinates(2, 2)).view(1, 2, 2, 2).repeat(2, 1, 1, 1)
    target, reference = noise(2, 3, 5, 5), noise(2, 3, 5, 5, seed=1)
    mask = torch.zeros(2, 5, 5)
    mask[:, 1:3, :2] = 1
    loss = flow_loss(flow, target, reference, mask, torch.tensor([True, False]))
    error = (warped(reference, flow, 5, 5) - target)[0, :, 1:3, :2]
    assert torch.allclose(loss[0], error.square().mean())
    assert loss[1] == 0
    # Pixels outside the mask, and noisy samples, have no gradient.
    leaf = target.clone().requires_grad_(True)
    flow_loss(flow, leaf, reference, mask, torch.tensor([True, False])).sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad.abs().sum(1) > 0, mask.bool() & torch.tensor([True, False])[:, None, None])
    assert flow_loss(flow, target, reference, torch.zeros(2, 5, 5), None).tolist() == [0, 0]


def test_the_gradient_of_the_flow_loss() -> None:
    key, mask = noise(1, 2, 6, 4, seed=1), torch.ones(1, 9, 9)
    ramp = coordinates(9, 9).view(9, 9, 2).permute(2, 0, 1)[None]
    target = noise(1, 2, 9, 9, seed=2)

    def value(query: torch.Tensor) -> torch.Tensor:
        flow = flow_field(query, key, (2, 3), scale=0.5).view(1, 2, 3, 2)
        return flow_loss(flow, target, ramp, mask, None).sum()

    check_gradient(value, noise(1, 2, 6, 4))


def test_reach() -> None:
    # Two queries of the reference, of which the first counts: weights 1 / 4 and 3 / 4 of the picture's two tokens.
    query, key = torch.tensor([[[[1.0], [-5.0]]]]), torch.tensor([[[[0.0], [math.log(3)]]]])
    found = reach(query, key, torch.tensor([[1.0, 0.0]]), 1.0)
    assert torch.allclose(found, torch.tensor([[0.25, 0.75]]))
    query, key = noise(2, 3, 5, 4), noise(2, 3, 7, 4, seed=1)
    rows = (query @ key.transpose(-1, -2) * 0.5).softmax(-1).mean(1)
    assert torch.allclose(reach(query, key, torch.ones(2, 5), 0.5), rows.mean(1), atol=1e-6)
    picked = noise(2, 7, seed=2)
    check_gradient(lambda q: (reach(q, key, torch.ones(2, 5), 0.5) * picked).sum(), query)
