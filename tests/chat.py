"""Tiny random pipelines whose text encoder is a language model that reads the prompt inside of a chat."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    QwenImageEditPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from tests.parts import Tiny, qwen_tokenizer, revived, t5_tokenizer, vae

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


def flux2_model(guidance: bool) -> Flux2Transformer2DModel:
    torch.manual_seed(0)
    return revived(
        Flux2Transformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=48,
            timestep_guidance_channels=16,
            axes_dims_rope=(2, 2, 2, 2),
            guidance_embeds=guidance,
        )
    )


def flux2_vae() -> AutoencoderKLFlux2:
    return AutoencoderKLFlux2(
        block_out_channels=(4, 8),
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
    ).eval()


def klein() -> Any:
    model = flux2_model(guidance=False)
    config = Qwen3Config(**SMALL, head_dim=8, vocab_size=len(qwen_tokenizer()))
    return Flux2KleinPipeline(
        transformer=model,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=flux2_vae(),
        text_encoder=Qwen3ForCausalLM(config).eval(),
        tokenizer=qwen_tokenizer(),
    )


MISTRAL_CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{% for part in m.content %}{{ part.text }}{% endfor %}"
    "[/{{ m.role }}]{% endfor %}"
)


class ChatProcessor(ProcessorMixin):
    """Pixtral's without pictures, which need torchvision."""

    def __init__(self, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(tokenizer, chat_template=chat_template)


@cache
def mistral_processor() -> ChatProcessor:
    """A chat that writes its own first token, padded on the left, as Mistral's is."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(t5_tokenizer().backend_tokenizer),
        bos_token="<s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        chat_template=MISTRAL_CHAT,
    )
    made.add_tokens(["[IMG]", "[IMG_BREAK]", "[IMG_END]"], special_tokens=True)
    return ChatProcessor(made, chat_template=MISTRAL_CHAT)


def flux2() -> Any:
    model = flux2_model(guidance=True)
    processor = mistral_processor()
    vision = {**SMALL, "num_hidden_layers": 1, "head_dim": 8, "model_type": "pixtral", "image_size": 28}
    config = Mistral3Config(
        text_config={**SMALL, "head_dim": 8, "model_type": "mistral", "vocab_size": len(processor.tokenizer)},
        vision_config=vision,
        image_token_index=processor.tokenizer.convert_tokens_to_ids("[IMG]"),
    )
    pipe = Flux2Pipeline(
        transformer=model,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=flux2_vae(),
        text_encoder=Mistral3ForConditionalGeneration(config).eval(),
        tokenizer=processor,
    )
    pipe.system_message = "the red bird"
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
KLEIN = Tiny(
    klein,
    guided={"guidance_scale": 3.0},
    free={"guidance_scale": 1.0},
    size=(16, 24),
    grid=(1, 4, 6),
    sites=2,
    more={"max_sequence_length": 24, "text_encoder_out_layers": (0, 1, 2)},
)
FLUX2 = Tiny(
    flux2,
    guided={},
    free={},
    size=(16, 24),
    grid=(1, 4, 6),
    sites=2,
    more={"max_sequence_length": 96, "text_encoder_out_layers": (0, 1, 2)},
    unguided=True,
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
