"""Tiny random FLUX.2 pipelines: dev, which a Mistral model reads for, and klein, which a Qwen3 model does."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.chat import SMALL
from tests.parts import Tiny, qwen_tokenizer, revived, t5_tokenizer


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
