"""Loading the models that ship with the package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, FluxPipeline, FluxTransformer2DModel, SchedulerMixin

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


def load(name: str = "sd", dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> DiffusionPipeline:
    """A shipped shapes model as a stock pipeline for 128x128 images.

    Args:
        name: "sd" is a Stable Diffusion in miniature (DDIM, no safety checker). "dit" is a FLUX in miniature
            (rectified flow); it shares the text encoder and the autoencoder of "sd", and its calls want
            `max_sequence_length=32`, the length of the text it was trained on.
        dtype: of the weights once loaded; they are stored in float16.
        device: where to put them.

    Raises:
        ValueError: the name is unknown.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel, StableDiffusionPipeline

    path = weights_path(name)
    # Converted here rather than by from_pretrained, whose argument for it changed its name.
    if name == "sd":
        return StableDiffusionPipeline.from_pretrained(path, local_files_only=True).to(device, dtype)
    transformer = FluxTransformer2DModel.from_pretrained(path / "transformer")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(path / "scheduler")
    return assemble(transformer, scheduler).to(device, dtype)


def assemble(transformer: FluxTransformer2DModel, scheduler: SchedulerMixin) -> FluxPipeline:
    """The joint-attention pipeline around a transformer: the one text encoder gives both kinds of text."""
    from diffusers import FluxPipeline

    base = load("sd")
    pipeline = FluxPipeline(
        transformer=transformer,
        scheduler=scheduler,
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        text_encoder_2=base.text_encoder,
        tokenizer_2=base.tokenizer,
    )
    # What the pipeline takes for its size, in latents, when none is given; FLUX.1's is 128.
    pipeline.default_sample_size = base.unet.config.sample_size
    return pipeline
