"""Loading the models that ship with the package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

_WEIGHTS = Path(__file__).parent / "weights"


def weights_path(name: str = "sd") -> Path:
    """The folder of a shipped model, which `from_pretrained` takes like any other.

    Raises:
        ValueError: there is no shapes model of this name; the message lists those there are.
    """
    known = sorted(p.parent.name for p in _WEIGHTS.glob("*/model_index.json"))
    if name not in known:
        raise ValueError(f"unknown shapes model {name!r}; known: {', '.join(known) or 'none'}")
    return _WEIGHTS / name


def load(
    name: str = "sd", dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> StableDiffusionPipeline:
    """A shipped shapes model as a stock pipeline: 128x128 images, DDIM, no safety checker.

    Args:
        name: which model; "sd" is a Stable Diffusion in miniature.
        dtype: of the weights once loaded; they are stored in float16.
        device: where to put them.

    Raises:
        ValueError: the name is unknown.
    """
    from diffusers import StableDiffusionPipeline

    # Converted here rather than by from_pretrained, whose argument for it changed its name.
    pipeline = StableDiffusionPipeline.from_pretrained(weights_path(name), local_files_only=True)
    return pipeline.to(device, dtype)
