"""Tiny random pipelines whose text encoder is a language model that reads the prompt inside of a chat."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen3Config,
    Qwen3Model,
)

from tests.parts import Tiny, qwen_tokenizer, revived, vae

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
ROTARY: dict[str, Any] = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}


def qwen_reader() -> Qwen2_5_VLForConditionalGeneration:
    tokenizer = qwen_tokenizer()
    config = Qwen2_5_VLConfig(
        text_config={**SMALL, "rope_scaling": ROTARY, "vocab_size": len(tokenizer)},
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "fullatt_block_indexes": [0],
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


class PictureProcessor(Qwen2VLProcessor):
    """The real one without a processor for videos, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> None:
        return None


def qwen(kind: type = QwenImagePipeline) -> Any:
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    edits = kind is QwenImageEditPipeline
    more = {"processor": PictureProcessor(Qwen2VLImageProcessor(), qwen_tokenizer())} if edits else {}
    pipe = kind(
        transformer=revived(model),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=qwen_reader(),
        tokenizer=qwen_tokenizer(),
        **more,
    )
    # How many tokens of our vocabulary the template takes before the prompt.
    before = pipe.prompt_template_encode.split("<|vision_start|>")[0].split("{}")[0]
    pipe.prompt_template_encode_start_idx = len(qwen_tokenizer()(before)["input_ids"])
    return pipe


def zimage() -> Any:
    torch.manual_seed(0)
    model = ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 2, 2],
        axes_lens=[256, 32, 32],
    )
    config = Qwen3Config(**SMALL, head_dim=8, vocab_size=len(qwen_tokenizer()))
    return ZImagePipeline(
        transformer=revived(model),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        text_encoder=Qwen3Model(config).eval(),
        tokenizer=qwen_tokenizer(),
    )


QWEN = Tiny(
    qwen,
    guided={"true_cfg_scale": 3.0, "negative_prompt": "a bird"},
    free={"true_cfg_scale": 1.0},
    size=(16, 24),
    grid=(1, 4, 6),
    sites=2,
    rescaled=True,
    masks=True,
)
ZIMAGE = Tiny(
    zimage,
    guided={"guidance_scale": 3.0, "negative_prompt": "a bird " * 8},
    free={"guidance_scale": 0.0},
    size=(16, 24),
    grid=(1, 4, 6),
    sites=3,
    more={"max_sequence_length": 64},
    plus=1.0,
    masks=True,
)
