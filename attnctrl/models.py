"""Loading a pipeline by name, the shipped models, a folder, or a hub id; and calling it like any other."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch

from attnctrl.errors import ControlError
from attnctrl.processors import family_of

SHIPPED = "shapes-"
LARGEST = 16
"""How many times the area that a model draws by itself a given picture may have: 2048x2048 pixels for 512x512."""


def load_pipeline(model: str, *, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Any:
    """A text-to-image pipeline, or one to videos.

    model: "shapes-sd", "shapes-dit" or, with its LoRA, "shapes-dit+entities", "shapes-video", or "shapes-instruct",
    which follows instructions, for a shipped model, else what diffusers' `from_pretrained` takes (safetensors only).
    device: default CUDA where there is one, else CPU. dtype: default float16 on CUDA, float32 elsewhere.
    Raises ControlError when there is no shipped model of that name, or its LoRA cannot be loaded.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
    if model.startswith(SHIPPED):
        from attnctrl import shapes

        return shapes.load(model.removeprefix(SHIPPED), dtype=dtype, device=device)
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(model, use_safetensors=True).to(device, dtype)


def call_arguments(
    pipe: Any, prompt: str | list[str], guidance: float | None = None, given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What to call `pipe` with for `prompt`, which is among it.

    guidance: a scale that means the same on every model, where 1 is none: `guidance_scale` of Stable Diffusion and of
    models distilled to it, `true_cfg_scale` with an empty negative prompt of other FLUX- and Qwen-class models; None
    for the pipeline's own default. given: further arguments, which win. Added is what the model cannot do without,
    such as a `max_sequence_length` that its text encoder has positions for.
    Raises ControlError for arguments that the pipeline's call does not have.
    """
    given = given or {}
    accepted = inspect.signature(type(pipe).__call__).parameters
    for name in given:
        if name not in accepted:
            known = ", ".join(n for n in accepted if n != "self")
            raise ControlError(f'a call of {type(pipe).__name__} has no "{name}": it has {known}.')
    family = family_of(pipe)
    scale = {} if guidance is None else family.guidance(pipe, prompt, guidance)
    return {"prompt": prompt, **family.required(pipe), **scale, **given}


def side_multiple(pipe: Any) -> int:
    """Pictures of this pipeline have sides of whole multiples of so many pixels."""
    # FLUX's and QwenImage's image processors count the packing of 2x2 latents, Stable Diffusion 3's its patches not.
    packed = int(pipe.image_processor.config.get("vae_scale_factor", 8))
    # The pipelines of UNets ask for whole multiples of 8, whatever their autoencoder makes of them.
    least = 8 if getattr(pipe, "unet", None) is not None else 1
    return math.lcm(packed, int(pipe.vae_scale_factor) * int(getattr(pipe, "patch_size", 1)), least)


def check_area(pipe: Any, width: int, height: int) -> None:
    """Raises ControlError for a picture of so many pixels that the model cannot be expected to draw it."""
    model = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    latents = getattr(pipe, "default_sample_size", None) or getattr(getattr(model, "config", None), "sample_size", None)
    if not isinstance(latents, int):
        return
    side = latents * int(pipe.vae_scale_factor)
    if width * height > LARGEST * side**2:
        raise ControlError(
            f"the picture is {width}x{height} pixels, more than {LARGEST} times the {side}x{side} that this model "
            "draws: make it smaller, or cut out the part that is edited."
        )
