"""Tiny random transformer pipelines of the real classes; a family's entry here puts it through the parity tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextModelWithProjection, Gemma2Config, Gemma2Model

from tests import tiny
from tests.chat import QWEN, ZIMAGE
from tests.flux2 import FLUX2, KLEIN
from tests.parts import TOKENS, Tiny, clip, gemma_tokenizer, revived, t5, t5_tokenizer, vae


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


def sd3(channels: int = 4, conditions: int = 0) -> Any:
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=channels + conditions,
        out_channels=channels,
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
        vae=vae(channels),
        text_encoder=CLIPTextModelWithProjection(config).eval(),
        tokenizer=tiny.tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(config).eval(),
        tokenizer_2=tiny.tokenizer(),
        text_encoder_3=t5(32),
        tokenizer_3=t5_tokenizer(),
    )


def pixart() -> Any:
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        sample_size=16,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=16,
    )
    return PixArtAlphaPipeline(
        transformer=revived(model),
        scheduler=tiny.SCHEDULERS["ddim"](),
        vae=vae(),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
    )


def sana() -> Any:
    torch.manual_seed(0)
    model = SanaTransformer2DModel(
        sample_size=32,
        num_layers=2,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        attention_head_dim=8,
        num_attention_heads=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=8,
        qk_norm="rms_norm_across_heads",
    )
    tokenizer = gemma_tokenizer()
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=4,
    )
    blocks = ("ResBlock", "EfficientViTBlock")
    return SanaPipeline(
        transformer=revived(model),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderDC(
            in_channels=3,
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=blocks,
            decoder_block_types=blocks,
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
        ).eval(),
        text_encoder=Gemma2Model(config).eval(),
        tokenizer=tokenizer,
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
PIXART = Tiny(
    pixart,
    guided={"guidance_scale": 3.0, "negative_prompt": "a bird"},
    free={"guidance_scale": 1.0},
    size=(16, 24),
    grid=(1, 4, 6),
    sites=4,
    more={"max_sequence_length": TOKENS, "use_resolution_binning": False},
    masks=True,
)
SANA = Tiny(
    sana,
    guided={"guidance_scale": 3.0, "negative_prompt": "a bird"},
    free={"guidance_scale": 1.0},
    size=(32, 64),
    grid=(1, 8, 16),
    sites=2,
    more={
        "max_sequence_length": TOKENS,
        "use_resolution_binning": False,
        "complex_human_instruction": ["the red dog", "and the bird: "],
    },
    masks=True,
)
FAMILIES = {
    "flux": FLUX,
    "sd3": SD3,
    "qwen": QWEN,
    "pixart": PIXART,
    "sigma": replace(PIXART, make=lambda: PixArtSigmaPipeline(**pixart().components)),
    "sana": SANA,
    "flux2": FLUX2,
    "klein": KLEIN,
    "zimage": ZIMAGE,
}


def draw(pipe: Any, family: Tiny, prompt: Any = tiny.PROMPT, steps: int = 3, free: bool = False, **kwargs: Any) -> Any:
    """The latents of a short run from seed 7, in the pipeline's own layout."""
    pipe.set_progress_bar_config(disable=True)
    kwargs.setdefault("generator", torch.Generator().manual_seed(7))
    given = {**family.more, **(family.free if free else family.guided), **kwargs}
    height, width = family.size
    size = {"height": height, "width": width}
    return pipe(prompt=prompt, num_inference_steps=steps, output_type="latent", **size, **given)[0]
