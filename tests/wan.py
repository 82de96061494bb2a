"""Tiny random Wan pipelines of the real classes, for the tests that every family goes through."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline
from diffusers import WanTransformer3DModel as WanModel
from diffusers.pipelines.wan import pipeline_wan_i2v
from diffusers.utils import is_ftfy_available
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.parts import TOKENS, Tiny, revived, t5_tokenizer

FRAMES = 9
FTFY = SimpleNamespace(fix_text=lambda text: text)
# Without ftfy, which diffusers takes for optional, its image-to-video pipeline fails at this name.
if not is_ftfy_available():
    pipeline_wan_i2v.ftfy = FTFY
PICTURE = Image.radial_gradient("L").convert("RGB").resize((32, 16))


def umt5() -> UMT5EncoderModel:
    words = len(t5_tokenizer())
    config = UMT5Config(vocab_size=words, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0)
    return UMT5EncoderModel(config).eval()


def wan_model(channels: int = 4, **more: Any) -> WanModel:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": channels,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 16,
        "ffn_dim": 16,
        "num_layers": 1,
        "rope_max_seq_len": 16,
    }
    return revived(WanModel(**{**config, **more}))


def wan_parts() -> dict[str, Any]:
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        scale_factor_spatial=2,
        scale_factor_temporal=2,
    )
    return {
        "tokenizer": t5_tokenizer(),
        "text_encoder": umt5(),
        "vae": vae.eval(),
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        ),
    }


def wan() -> WanPipeline:
    torch.manual_seed(0)
    return WanPipeline(transformer=wan_model(), **wan_parts())


def wan_experts(layers: int = 1) -> WanPipeline:
    torch.manual_seed(0)
    first, second = (wan_model(num_layers=layers) for _ in range(2))
    return WanPipeline(transformer=first, transformer_2=second, boundary_ratio=0.8, **wan_parts())


def wan_expanded() -> WanPipeline:
    torch.manual_seed(0)
    return WanPipeline(transformer=wan_model(), expand_timesteps=True, **wan_parts())


def wan_image() -> WanImageToVideoPipeline:
    """Wan 2.1: the image is given as further channels and through a CLIP encoder."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    return WanImageToVideoPipeline(
        transformer=wan_model(4 + 4 + 2, image_dim=16, added_kv_proj_dim=24),
        image_encoder=CLIPVisionModel(vision).eval(),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        **wan_parts(),
    )


def wan_image_expanded() -> WanImageToVideoPipeline:
    """Wan 2.2, 5B: the image is given in place of the first latent frame."""
    torch.manual_seed(0)
    return WanImageToVideoPipeline(
        transformer=wan_model(), image_encoder=None, image_processor=None, expand_timesteps=True, **wan_parts()
    )


def _wan(make: Any, condition: Any = None, **more: Any) -> Tiny:
    return Tiny(
        make,
        guided={"guidance_scale": 3.0, "negative_prompt": "a bird"},
        free={"guidance_scale": 1.0},
        size=(16, 32),
        grid=(5, 4, 8),
        sites=4 if make is wan_experts else 2,
        experts=2 if make is wan_experts else 1,
        given_frame=make is wan_image_expanded,
        condition=condition,
        more={"num_frames": FRAMES, "max_sequence_length": TOKENS, **more},
    )


WAN = {
    "wan": _wan(wan),
    "wan-experts": _wan(wan_experts),
    "wan-expanded": _wan(wan_expanded),
    "wan-image": _wan(wan_image, lambda sample: sample[:, 4:], image=PICTURE, max_sequence_length=512),
    "wan-image-expanded": _wan(wan_image_expanded, lambda sample: sample[:, :, :1], image=PICTURE),
}
