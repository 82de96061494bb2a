"""The untrained model on which the benches are tested."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline

from attnctrl.shapes import models
from attnctrl.shapes.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a model of the shapes world's architecture, much narrowed."""
    torch.manual_seed(0)
    tokens = load_tokenizer()
    width = (8, 8, 8, 8)
    pipe = StableDiffusionPipeline(
        vae=models.autoencoder(encoder_block_out_channels=width, decoder_block_out_channels=width).eval(),
        text_encoder=models.text_encoder(len(tokens), tokens.bos_token_id, tokens.eos_token_id).eval(),
        tokenizer=tokens,
        unet=models.denoiser(block_out_channels=(8, 16), attention_head_dim=(2, 2), norm_num_groups=4).eval(),
        scheduler=models.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("model")
    pipe.save_pretrained(folder)
    return str(folder)
