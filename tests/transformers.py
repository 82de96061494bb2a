"""Tiny random transformer pipelines of the real classes; a family's entry here puts it through the parity tests."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextModelWithProjection

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


def sd3(**more: Any) -> Any:
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    config = tiny.text_config(projection_dim=16)
    return StableDiffusion3Pipeline(
        transformer=revived(model),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(),
        text_encoder=CLIPTextModelWithProjection(config).eval(),
        tokenizer=tiny.tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(config).eval(),
        tokenizer_2=tiny.tokenizer(),
        text_encoder_3=t5(32),
        tokenizer_3=t5_tokenizer(),
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
SD3 = Tiny(
    sd3,
    guided={"guidance_scale": 3.0},
    free={"guidance_scale": 1.0},
    size=(16, 24),
    grid=(1, 4, 6),
    sites=3,
    more={"max_sequence_length": TOKENS},
)
FAMILIES = {"flux": FLUX, "sd3": SD3}


def draw(pipe: Any, family: Tiny, prompt: Any = tiny.PROMPT, steps: int = 3, free: bool = False, **kwargs: Any) -> Any:
    """The latents of a short run from seed 7, in the pipeline's own layout."""
    pipe.set_progress_bar_config(disable=True)
    kwargs.setdefault("generator", torch.Generator().manual_seed(7))
    given = {**family.more, **(family.free if free else family.guided), **kwargs}
    height, width = family.size
    return pipe(prompt, num_inference_steps=steps, height=height, width=width, output_type="latent", **given)[0]
