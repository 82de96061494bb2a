"""Tiny random pipelines of the real classes, built from their configs; nothing is downloaded."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

PROMPT = "a cat and a dog"
WORDS = ("a", "and", "cat", "dog", "red", "bird", "the")
# steps_offset 1 is what pipelines expect; with 0 each of them prints a page of deprecation text.
BETAS: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
SCHEDULERS = {
    "ddim": lambda: DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False),
    "euler": lambda: EulerDiscreteScheduler(**BETAS),
    "dpm": lambda: DPMSolverMultistepScheduler(**BETAS),
    "lcm": lambda: LCMScheduler(**BETAS),
    # Not among the four that the project promises, but their schedules visit timesteps twice.
    "heun": lambda: HeunDiscreteScheduler(**BETAS),
    "pndm": lambda: PNDMScheduler(**BETAS, skip_prk_steps=True),
}
PROMISED = ("ddim", "euler", "dpm", "lcm")


@cache
def tokenizer() -> CLIPTokenizer:
    """CLIP's letters plus a few whole words, made by explicit merges."""
    letters = sorted(ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate([*letters, *(c + "</w>" for c in letters)])}
    merges = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            left, right = parts[0], parts[1]
            if (left, right) not in merges:
                merges.append((left, right))
            parts = [left + right, *parts[2:]]
            vocab.setdefault(parts[0], len(vocab))
    vocab["<|startoftext|>"] = len(vocab)
    vocab["<|endoftext|>"] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=24)


def text_config(**more: Any) -> CLIPTextConfig:
    tok = tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tok),
        hidden_size=more.pop("hidden_size", 16),
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=24,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
        **more,
    )


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=[4, 8],
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=2,
    )


def unet(in_channels: int = 4) -> UNet2DConditionModel:
    """Two levels with attention, so that maps exist at the latents' grid and at half of it."""
    return UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=16,
        in_channels=in_channels,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def sd(scheduler: str = "ddim", seed: int = 0, kind: type = StableDiffusionPipeline, in_channels: int = 4) -> Any:
    torch.manual_seed(seed)
    pipe = kind(
        vae=vae().eval(),
        text_encoder=CLIPTextModel(text_config()).eval(),
        tokenizer=tokenizer(),
        unet=unet(in_channels).eval(),
        scheduler=SCHEDULERS[scheduler](),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def img2img(scheduler: str = "ddim") -> Any:
    return sd(scheduler, kind=StableDiffusionImg2ImgPipeline)


def inpaint(scheduler: str = "ddim", in_channels: int = 9) -> Any:
    return sd(scheduler, kind=StableDiffusionInpaintPipeline, in_channels=in_channels)


def instruct(scheduler: str = "ddim") -> Any:
    return sd(scheduler, kind=StableDiffusionInstructPix2PixPipeline, in_channels=8)


def sdxl(scheduler: str = "euler", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=6 * 8 + 16,
        norm_num_groups=4,
    )
    pipe = StableDiffusionXLPipeline(
        vae=vae().eval(),
        text_encoder=CLIPTextModel(text_config()).eval(),
        text_encoder_2=CLIPTextModelWithProjection(text_config(projection_dim=16)).eval(),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=model.eval(),
        scheduler=SCHEDULERS[scheduler](),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(
    pipe: Any, prompt: Any = PROMPT, steps: int = 3, size: tuple[int, int] = (32, 32), **kwargs: Any
) -> torch.Tensor:
    """The latents of a short run from seed 7, (batch, 4, height / 2, width / 2); size is (height, width)."""
    kwargs.setdefault("guidance_scale", 4.0)
    kwargs.setdefault("generator", torch.Generator().manual_seed(7))
    return pipe(prompt, num_inference_steps=steps, height=size[0], width=size[1], output_type="latent", **kwargs).images


def redraw(pipe: Any, prompt: Any = PROMPT, steps: int = 4, strength: float = 0.5, **kwargs: Any) -> torch.Tensor:
    """The same from a picture, for image-to-image pipelines and (its middle masked) for inpainting ones."""
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    if isinstance(pipe, StableDiffusionInpaintPipeline):
        mask = torch.zeros(1, 1, 32, 32)
        mask[..., 8:24, 8:24] = 1
        kwargs |= {"mask_image": mask, "height": 32, "width": 32}
    kwargs.setdefault("guidance_scale", 4.0)
    kwargs.setdefault("generator", torch.Generator().manual_seed(7))
    return pipe(
        prompt, image=picture, num_inference_steps=steps, strength=strength, output_type="latent", **kwargs
    ).images


def instructed(pipe: Any, prompt: Any = PROMPT, steps: int = 3, **kwargs: Any) -> torch.Tensor:
    """The latents of a short run of an instruction on a picture, (batch, 4, 16, 16); guided by text and picture."""
    count = (1 if isinstance(prompt, str) else len(prompt)) * kwargs.get("num_images_per_prompt", 1)
    pictures = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    given = {"guidance_scale": 4.0, "image_guidance_scale": 1.5, "image": pictures, **kwargs}
    given.setdefault("generator", torch.Generator().manual_seed(7))
    return pipe(prompt, num_inference_steps=steps, output_type="latent", **given).images
