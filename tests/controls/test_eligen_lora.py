"""EliGen with a LoRA on the transformer: it takes part, and the model without it is the stock model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline

import attnctrl as ac
from tests.probes import REGIONS
from tests.transformers import FLUX, draw

NAME = "pytorch_lora_weights.safetensors"
SEEN = ac.EliGen(REGIONS, entity_tokens=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LoRA of rank 2 on the attention's projections, as diffusers saves it."""
    path = tmp_path_factory.mktemp("lora")
    generator = torch.Generator().manual_seed(0)
    layers: dict[str, Any] = {}
    for name, module in FLUX.make().transformer.named_modules():
        if name.endswith(("attn.to_q", "attn.to_v", "attn.add_k_proj")):
            wide, narrow = module.in_features, module.out_features
            layers[f"{name}.lora_A.weight"] = torch.randn(2, wide, generator=generator)
            layers[f"{name}.lora_B.weight"] = torch.randn(narrow, 2, generator=generator)
    FluxPipeline.save_lora_weights(path, transformer_lora_layers=layers)
    return path


def under(pipe: Any, control: ac.Control) -> torch.Tensor:
    with ac.control(pipe, control) as run:
        drawn = draw(pipe, FLUX)
    assert control.idle or {row.point for row in run.report.rows.values()} == {"context", "mask"}
    return drawn


def test_a_lora_takes_part_and_leaves_no_trace(folder: Path) -> None:
    pipe = FLUX.make()
    stock, entities = draw(pipe, FLUX), under(pipe, SEEN)

    pipe.load_lora_weights(folder, weight_name=NAME, adapter_name="entities")
    assert pipe.get_list_adapters() == {"transformer": ["entities"]}
    adapted = draw(pipe, FLUX)
    assert not torch.allclose(adapted, stock, atol=1e-3)
    assert torch.equal(under(pipe, ac.EliGen(REGIONS, until=0.0)), adapted)
    assert torch.equal(under(pipe, ac.EliGen(())), adapted)
    both = under(pipe, SEEN)
    assert not torch.allclose(both, entities, atol=1e-3)
    assert not torch.allclose(both, adapted, atol=1e-3)

    pipe.disable_lora()
    assert torch.equal(draw(pipe, FLUX), stock)
    assert torch.equal(under(pipe, SEEN), entities)
    pipe.enable_lora()
    assert torch.equal(under(pipe, SEEN), both)
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe, FLUX), stock)
    assert torch.equal(under(pipe, SEEN), entities)


def test_a_lora_may_come_and_go_inside_the_block(folder: Path) -> None:
    pipe = FLUX.make()
    entities = under(pipe, SEEN)
    with ac.control(pipe, SEEN):
        pipe.load_lora_weights(folder, weight_name=NAME)
        assert not torch.allclose(draw(pipe, FLUX), entities, atol=1e-3)
        pipe.unload_lora_weights()
        assert torch.equal(draw(pipe, FLUX), entities)


def test_another_control_works_beside_both(folder: Path) -> None:
    """A loss on the phrases' maps is descended through the LoRA's layers."""
    pipe = FLUX.make()
    pipe.load_lora_weights(folder, weight_name=NAME)
    alone = under(pipe, SEEN)
    guided = ac.AttendExcite(("cat", "dog"), window=ac.Window(0, 1), iterations=1, where=ac.Where(kinds=("joint",)))
    with ac.control(pipe, SEEN, guided) as run:
        drawn = draw(pipe, FLUX)
    assert len(run.losses) == 3
    assert torch.isfinite(drawn).all()
    assert not torch.equal(drawn, alone)
