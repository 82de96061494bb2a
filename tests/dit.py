"""An untrained, narrow stand-in for the FLUX-class shapes model and its LoRA, where the package looks for weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from attnctrl.shapes import models, pretrained
from attnctrl.shapes.train_entities import add_lora, save_lora
from tests.parts import revived


def transformer() -> Any:
    torch.manual_seed(0)
    model = models.transformer(num_single_layers=1, num_attention_heads=2)
    return revived(model)


def write(folder: Path) -> Path:
    """A folder of weights with the shipped `sd`, this `dit` and a random LoRA `entities`."""
    (folder / "dit").mkdir(parents=True)
    (folder / "sd").symlink_to(pretrained.weights_path("sd"), target_is_directory=True)
    model = transformer()
    pretrained.assemble(model, models.flow_scheduler()).save_config(folder / "dit")
    model.save_pretrained(folder / "dit" / "transformer")
    models.flow_scheduler().save_pretrained(folder / "dit" / "scheduler")
    lora = add_lora(model, 2)
    for matrix in lora:
        torch.nn.init.normal_(matrix, std=0.3)
    save_lora(model, folder / "dit" / "entities")
    return folder
