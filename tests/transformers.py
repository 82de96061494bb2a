"""Tiny random transformer pipelines of the real classes; a family's entry here puts it through the parity tests."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from tests import tiny
from tests.parts import TOKENS, Tiny, clip, revived, t5, t5_tokenizer, vae


def flux() -> Any:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    )
    return FluxPipeline(
        transformer=revived(model),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        text_encoder=clip(),
        tokenizer=tiny.tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
    )


FLUX = Tiny(
    flux,
    guided={"true_cfg_scale": 3.0, "negative_prompt": "a bird"},
    free={"true_cfg_scale": 1.0},
    size=(16, 24),
    grid=(1, 4, 6),
    sites=2,
    more={"max_sequence_length": TOKENS},
)
FAMILIES = {"flux": FLUX}


def draw(pipe: Any, family: Tiny, prompt: Any = tiny.PROMPT, steps: int = 3, free: bool = False, **kwargs: Any) -> Any:
    """The latents of a short run from seed 7, in the pipeline's own layout."""
    pipe.set_progress_bar_config(disable=True)
    kwargs.setdefault("generator", torch.Generator().manual_seed(7))
    given = {**family.more, **(family.free if free else family.guided), **kwargs}
    height, width = family.size
    return pipe(prompt=prompt, num_inference_steps=steps, height=height, width=width, output_type="latent", **given)[0]
