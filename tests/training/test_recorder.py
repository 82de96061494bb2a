"""Maps of a training step, with gradients, beside the output of the stock model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig

import attnctrl as ac
from attnctrl.control import Where
from attnctrl.training import localisation, record
from tests import tiny
from tests.transformers import FLUX

ALL = Where(kinds=("self", "cross", "joint"))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unet_call(unet: Any) -> Callable[[], torch.Tensor]:
    sample, text = noise(2, unet.config.in_channels, 16, 16), noise(2, 6, unet.config.cross_attention_dim, seed=1)
    return lambda: unet(sample, torch.tensor([100, 700]), text, return_dict=False)[0]


def flux_call(transformer: Any) -> Callable[[], torch.Tensor]:
    config, side = transformer.config, 4
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()
    given = {
        "hidden_states": noise(2, side * side, config.in_channels),
        "timestep": torch.tensor([0.2, 0.7]),
        "encoder_hidden_states": noise(2, 6, config.joint_attention_dim, seed=1),
        "pooled_projections": noise(2, config.pooled_projection_dim, seed=2),
        "txt_ids": torch.zeros(6, 3),
        "img_ids": places,
    }
    return lambda: transformer(**given, return_dict=False)[0]


def unet() -> tuple[Any, Callable[[], torch.Tensor]]:
    model = tiny.sd().unet
    return model, unet_call(model)


def flux() -> tuple[Any, Callable[[], torch.Tensor]]:
    model = FLUX.make().transformer
    return model, flux_call(model)


@pytest.mark.parametrize("make", [unet, flux])
@pytest.mark.parametrize("where", [Where(), ALL], ids=["text", "all"])
def test_the_model_computes_what_it_always_does(make: Callable, where: Where) -> None:
    model, call = make()
    stock = call()
    processors = [module.processor for module in model.modules() if hasattr(module, "processor")]
    with record(model, where) as recorded:
        with pytest.raises(ac.ControlError, match="nothing is recorded yet"):
            _ = recorded.maps
        assert torch.equal(call(), stock)
        maps = recorded.maps
        assert torch.equal(call(), stock)
        assert recorded.maps.cross.keys() == maps.cross.keys()
    for layer in maps.cross.values():
        assert layer.probs.shape == (2, layer.grid[1] * layer.grid[2], 6)
        assert torch.allclose(layer.probs.sum(-1), torch.ones(()), atol=1e-5)
        assert layer.probs.requires_grad
    assert bool(maps.self_) == (make is flux or where is ALL)
    assert processors == [module.processor for module in model.modules() if hasattr(module, "processor")]
    assert torch.equal(call(), stock)


def test_a_map_is_the_softmax_of_the_layers_own_projections() -> None:
    model, call = unet()
    layer = next(m for n, m in model.named_modules() if n.endswith("attn2"))
    seen: dict[str, torch.Tensor] = {}
    for part in ("to_q", "to_k"):
        getattr(layer, part).register_forward_hook(lambda m, i, out, part=part: seen.__setitem__(part, out))
    with record(model) as recorded:
        call()
    query, key = (seen[p].unflatten(-1, (layer.heads, -1)).transpose(1, 2) for p in ("to_q", "to_k"))
    expected = (query @ key.transpose(-1, -2) * layer.scale).softmax(-1).mean(1)
    assert torch.allclose(next(iter(recorded.maps.cross.values())).probs, expected, atol=1e-6)


def loss_of(recorded: Any) -> torch.Tensor:
    values = []
    for layer in recorded.maps.cross.values():
        count = layer.probs.shape[1]
        mask = (torch.arange(count) < count // 2).float().expand(2, 1, -1)
        values.append(localisation(layer.probs[..., 2:3].transpose(1, 2), mask).sum())
    return torch.stack(values).sum()


@pytest.mark.parametrize("make", [unet, flux])
def test_gradients_of_a_lora(make: Callable) -> None:
    """Against central differences along the gradient; other weights get none."""
    model, call = make()
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    weights = [p for p in model.parameters() if p.requires_grad]
    with record(model) as recorded:
        call()
        loss_of(recorded).backward()
        gradients = [torch.zeros_like(w) if w.grad is None else w.grad.clone() for w in weights]
        length = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        assert length > 1e-4

        @torch.no_grad()
        def moved(step: float) -> torch.Tensor:
            for weight, gradient in zip(weights, gradients, strict=True):
                weight += step * gradient / length
            call()
            value = loss_of(recorded)
            for weight, gradient in zip(weights, gradients, strict=True):
                weight -= step * gradient / length
            return value

        slope = (moved(0.02) - moved(-0.02)) / 0.04
    assert torch.allclose(slope, length, rtol=0.05)


def test_gradient_checkpointing_changes_nothing() -> None:
    found = []
    for checkpointed in (False, True):
        model, call = unet()
        model.train()
        if checkpointed:
            model.enable_gradient_checkpointing()
        with record(model) as recorded:
            predicted = call()
            (predicted.square().mean() + loss_of(recorded)).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, again = found
    assert plain.keys() == again.keys()
    assert all(torch.allclose(plain[n], again[n], atol=1e-5) for n in plain)


def test_what_cannot_be_recorded_says_why() -> None:
    pipe = tiny.sd()
    model, call = pipe.unet, unet_call(pipe.unet)
    with record(pipe, Where(kinds=("joint",))), pytest.raises(ac.ControlError, match="selects no layer of UNet2D"):
        call()
    with (
        ac.control(pipe, ac.LayoutGuidance([ac.Region("cat", box=(0, 0, 1, 1))])),
        record(pipe),
        pytest.raises(ac.ControlError, match="other processors are on all of its layers"),
    ):
        call()
    with pytest.raises(ac.ControlError, match="cannot look into a compiled model"), record(torch.compile(model)):
        pass
    with pytest.raises(ac.ControlError, match="is not supported yet"), record(torch.nn.Linear(2, 2)):
        pass
    with pytest.raises(ZeroDivisionError), record(model):
        _ = 1 / 0
    stock = call()
    with record(model):
        assert torch.equal(call(), stock)
