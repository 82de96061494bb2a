import math

import pytest
import torch
from torch.nn import functional

from attnctrl.shapes import models_video
from attnctrl.shapes.directed import AHEAD, BACK, STRENGTH, direct_heads
from attnctrl.shapes.motion import FRAMES

SIDE = 2


def directed():
    torch.manual_seed(0)
    model = models_video.transformer(num_layers=2)
    direct_heads(model)
    return model


def run(transformer):
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(2, 4, FRAMES, 2 * SIDE, 2 * SIDE, generator=generator)
    text = torch.randn(2, 32, 128, generator=generator)
    return transformer(noisy, torch.full((2,), 500.0), text, return_dict=False)[0]


@pytest.fixture(scope="module")
def logits():
    """(layer, head, frame of the query, frame of the key), means over pictures and places."""
    seen = []
    stock = functional.scaled_dot_product_attention

    def noted(query, key, *args, **kwargs):
        if key.shape[-2] == FRAMES * SIDE**2:
            seen.append((query @ key.transpose(-1, -2)) / query.shape[-1] ** 0.5)
        return stock(query, key, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(functional, "scaled_dot_product_attention", noted)
        run(directed())
    return torch.stack(seen).unflatten(-1, (FRAMES, -1)).unflatten(-3, (FRAMES, -1)).mean((1, 4, 6))


def odd_in_time(logits):
    """(layer, head, distance): what a frame that much later has over one that much earlier, halved."""
    middle = logits[:, :, FRAMES // 2]
    return (middle[..., FRAMES // 2 + 1 :] - middle[..., : FRAMES // 2].flip(-1)) / 2


def test_heads_look_ahead_and_back_as_the_formula_says(logits):
    distances = torch.arange(1, FRAMES // 2 + 1)
    # The second of the six rotary pairs of time, base 10000.
    by_hand = STRENGTH**2 / math.sqrt(32) * torch.sin(10000 ** (-1 / 6) * distances)
    assert torch.allclose(by_hand[-1], torch.tensor(2.25), atol=0.01)
    odd = odd_in_time(logits)[1]
    assert torch.allclose(odd[AHEAD], by_hand, rtol=0.35)
    assert torch.allclose(odd[BACK], -by_hand, rtol=0.35)


def test_other_heads_and_the_first_layer_are_left_alone(logits):
    odd = odd_in_time(logits)
    assert odd[0].abs().max() < 0.5
    assert odd[1, 2:].abs().max() < 0.5


def test_training_leaves_the_directions_and_nothing_else():
    transformer = directed()
    for block in transformer.blocks:
        torch.nn.init.normal_(block.scale_shift_table)
    torch.nn.init.normal_(transformer.proj_out.weight)
    attention = transformer.blocks[1].attn1
    before = {name: value.clone() for name, value in attention.state_dict().items()}
    optimiser = torch.optim.Adam(transformer.parameters(), lr=0.01)
    run(transformer).square().mean().backward()
    optimiser.step()
    time = [32 * head + row for head in (AHEAD, BACK) for row in (2, 3)]
    space = [32 * head + row for head in (AHEAD, BACK) for row in (12, 13, 22, 23)]
    held = {"to_q": time, "norm_q": time, "to_k": time + space, "norm_k": time + space}
    after = attention.state_dict()
    for name in ("to_q.weight", "to_q.bias", "norm_q.weight", "to_k.weight", "to_k.bias", "norm_k.weight"):
        moved = (after[name] != before[name]).reshape(192, -1).any(1)
        rows = held[name.split(".")[0]]
        assert not moved[rows].any(), name
        free = [row for row in range(192) if row not in rows]
        assert moved[free].float().mean() > 0.9, name
