"""Architectures of the video model of the shapes world: configurations and constructors, nothing trained.

`video` is a WanPipeline in miniature: 9 frames of 128x128, latents of 4 channels on 9x16x16, 9x8x8 = 576 tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import nn

from .models import LATENT_CHANNELS, TEXT_WIDTH
from .motion import FRAMES

PATCH = 4

AUTOENCODER: dict[str, Any] = {
    # Wan 2.2 takes its pictures apart into patches of 2x2 pixels; with 4x4 every block works on 32x32 or 16x16.
    "patch_size": PATCH,
    "in_channels": 3 * PATCH**2,
    "out_channels": 3 * PATCH**2,
    "base_dim": 48,
    "dim_mult": [1, 1],
    "num_res_blocks": 1,
    "z_dim": LATENT_CHANNELS,
    "temperal_downsample": [False],
    "latents_mean": [0.0] * LATENT_CHANNELS,
    "latents_std": [1.0] * LATENT_CHANNELS,
    "scale_factor_temporal": 1,
    "scale_factor_spatial": 8,
}

TRANSFORMER: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 6,
    "attention_head_dim": 32,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "text_dim": TEXT_WIDTH,
    "freq_dim": 128,
    "ffn_dim": 768,
    "num_layers": 5,
    "cross_attn_norm": True,
    "rope_max_seq_len": 4 * FRAMES,
}

POSTERIOR = 0.06
"""Standard deviation of the autoencoder's posterior, the same everywhere: the noise its decoder is trained with."""


def autoencoder(**overrides: Any) -> AutoencoderKLWan:
    """An untrained autoencoder: clips (batch, 3, frames, h, w) in -1..1 to latents (batch, 4, frames, h/8, w/8).

    The convolutions' taps on earlier frames begin at zero, and stay there when it is trained on single frames: every
    frame is then coded by itself, however many there are.
    """
    model = AutoencoderKLWan(**{**AUTOENCODER, **overrides})
    for module in model.modules():
        if isinstance(module, WanCausalConv3d):
            nn.init.zeros_(module.weight)
            nn.init.kaiming_normal_(module.weight.data[:, :, -1], nonlinearity="relu")
            nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if name.endswith("conv2.weight"):
            parameter.data.mul_(0.3)
    narrow_posterior(model)
    return model


def narrow_posterior(vae: AutoencoderKLWan) -> None:
    """Give the posterior its standard deviation, in place; the weight decay of a training wears it off."""
    with torch.no_grad():
        vae.quant_conv.weight[LATENT_CHANNELS:] = 0
        vae.quant_conv.bias[LATENT_CHANNELS:] = 2 * math.log(POSTERIOR)


def transformer(**overrides: Any) -> WanTransformer3DModel:
    """An untrained transformer: noisy latents (batch, 4, frames, h, w), timesteps (batch,) of 0..1000 and text
    (batch, 32, 128) to a velocity like the latents.

    Linear weights are Xavier's; modulations, outputs of the cross-attention and the output begin at zero, so that
    every block is the identity. diffusers leaves them at torch's random default.
    """
    model = WanTransformer3DModel(**{**TRANSFORMER, **overrides})
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if "attn2.to_out" in name or name.endswith("time_proj") or name == "proj_out":
                nn.init.zeros_(module.weight)
    for name, parameter in model.named_parameters():
        if name.endswith("scale_shift_table"):
            nn.init.zeros_(parameter)
    nn.init.xavier_uniform_(model.patch_embedding.weight.data.flatten(1))
    return model


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Euler steps of the flow, spent rather on the noisy half: the frames of a clip tell the same thing nine times."""
    return FlowMatchEulerDiscreteScheduler(shift=3.0)
