"""Tiny random video pipelines of the real classes, for the tests that every family goes through."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
)
from PIL import Image
from transformers import CLIPTextModel, LlamaConfig, LlamaModel, LlamaTokenizer

from tests import tiny
from tests.parts import LETTERS, TOKENS, Tiny, revived, t5, t5_tokenizer
from tests.wan import WAN

PICTURE = Image.radial_gradient("L").convert("RGB").resize((96, 64))
TEMPLATE = "a red bird: {}<|eot_id|>"


def cogvideox(scheduler: Any = CogVideoXDDIMScheduler, image: bool = False, **more: Any) -> Any:
    torch.manual_seed(0)
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=8 if image else 4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=2,
        sample_width=12,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=TOKENS,
        **more,
    )
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    return (CogVideoXImageToVideoPipeline if image else CogVideoXPipeline)(
        transformer=revived(model),
        scheduler=scheduler(),
        vae=vae.eval(),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
    )


@cache
def llama_tokenizer() -> LlamaTokenizer:
    """Whole words where the tests name them, letters for the rest."""
    starts = ["▁" + word[:end] for word in tiny.WORDS for end in range(1, len(word) + 1)]
    pieces = dict.fromkeys(["<unk>", "<s>", "</s>", "<|eot_id|>", "▁", *LETTERS, ":", *starts])
    merges = dict.fromkeys((start[:-1], start[-1]) for start in starts)
    return LlamaTokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=list(merges),
        pad_token="</s>",
        additional_special_tokens=["<|eot_id|>"],
        padding_side="right",
    )


def hunyuan() -> Any:
    torch.manual_seed(0)
    model = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=16,
        rope_axes_dim=(4, 2, 2),
    )
    llama = LlamaConfig(
        vocab_size=len(llama_tokenizer()),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    pooled = tiny.text_config()
    pooled.max_position_embeddings = 77
    return HunyuanVideoPipeline(
        transformer=revived(model),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        vae=None,
        text_encoder=LlamaModel(llama).eval(),
        tokenizer=llama_tokenizer(),
        text_encoder_2=CLIPTextModel(pooled).eval(),
        tokenizer_2=tiny.tokenizer(),
    )


def ltx() -> Any:
    torch.manual_seed(0)
    model = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=1,
        caption_channels=16,
    )
    return LTXPipeline(
        transformer=revived(model),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=None,
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
    )


def mochi() -> Any:
    torch.manual_seed(0)
    model = MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=16,
        time_embed_dim=8,
        max_sequence_length=TOKENS,
    )
    return MochiPipeline(
        transformer=revived(model),
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=None,
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
    )


def _video(make: Any, frames: int, scale: int, **more: Any) -> Tiny:
    return Tiny(
        make,
        guided={"guidance_scale": 3.0, "negative_prompt": "a bird"},
        free={"guidance_scale": 1.0},
        size=(4 * scale, 6 * scale),
        grid=(3, 4, 6),
        sites=2,
        condition=more.pop("condition", None),
        of_two={"image": [more["image"]] * 2} if "image" in more else {},
        masks=more.pop("masks", False),
        more={"num_frames": frames, "max_sequence_length": TOKENS, **more},
    )


HUNYUAN = Tiny(
    hunyuan,
    guided={"true_cfg_scale": 3.0, "negative_prompt": "a bird"},
    free={"true_cfg_scale": 1.0},
    size=(64, 96),
    grid=(3, 4, 6),
    sites=2,
    masks=True,
    more={
        "num_frames": 9,
        "max_sequence_length": TOKENS,
        "prompt_template": {"template": TEMPLATE, "crop_start": 4},
    },
)
VIDEOS = {
    **WAN,
    "cogvideox": _video(cogvideox, 9, 16),
    "cogvideox-rotary": _video(lambda: cogvideox(CogVideoXDPMScheduler, use_rotary_positional_embeddings=True), 9, 16),
    "cogvideox-image": _video(
        lambda: cogvideox(image=True), 9, 16, image=PICTURE, condition=lambda sample: sample[:, :, 4:]
    ),
    "hunyuan": HUNYUAN,
    "ltx": _video(ltx, 17, 32, masks=True),
    "mochi": _video(mochi, 13, 16, masks=True),
}
