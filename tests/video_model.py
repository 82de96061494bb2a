"""An untrained WanPipeline of the shapes world's architecture, much narrowed."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import WanPipeline

from attnctrl.shapes import VIDEO_CALL, models_video
from attnctrl.shapes.pretrained import shipped_text_encoder
from attnctrl.shapes.tokenizer import load_tokenizer
from attnctrl.shapes.train_words import widened


def pipeline(layers: int = 1) -> WanPipeline:
    torch.manual_seed(0)
    small = models_video.transformer(num_layers=layers, num_attention_heads=2, ffn_dim=32)
    for parameter in small.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)  # the outputs that begin at zero
    pipe = WanPipeline(
        tokenizer=load_tokenizer("video"),
        text_encoder=widened(shipped_text_encoder(), torch.zeros(19, 128)),
        vae=models_video.autoencoder(base_dim=8).eval(),
        scheduler=models_video.scheduler(),
        transformer=small.eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, steps: int = 2, **more: Any) -> torch.Tensor:
    """The latents of a short run without guidance."""
    given = {**VIDEO_CALL, "output_type": "latent", "guidance_scale": 1.0, **more}
    seed = torch.Generator().manual_seed(0)
    return pipe("a red circle moving left", num_inference_steps=steps, generator=seed, **given).frames
