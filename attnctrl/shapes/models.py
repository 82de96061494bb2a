"""Architectures of the shapes models: configurations and constructors, nothing trained.

`sd` is a StableDiffusionPipeline in miniature: 128x128 images, 16x16 latents of 4 channels, 32 text tokens. `dit` is a
FluxPipeline in miniature with the same autoencoder and text encoder: 64 latent tokens of 2x2 patches. `instruct` is a
StableDiffusionInstructPix2PixPipeline with the parts of `sd` and a denoiser of its own, which takes 8 channels.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    UNet2DConditionModel,
)
from diffusers.models.autoencoders.vae import DecoderTiny
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

IMAGE_SIZE, LATENT_SIZE, LATENT_CHANNELS = 128, 16, 4
TEXT_LENGTH, TEXT_WIDTH = 32, 128

AUTOENCODER: dict[str, Any] = {
    "encoder_block_out_channels": (48, 48, 48, 48),
    "decoder_block_out_channels": (48, 48, 48, 48),
    # Residual blocks sit at 32x32 and 16x16 only: a fine-grained block costs 16 times a coarse one, and 48
    # channels on a 4x4-pixel patch are enough for the linear layers above to draw any patch.
    "num_encoder_blocks": (0, 0, 2, 3),
    "num_decoder_blocks": (3, 4, 0, 0),
    "latent_channels": LATENT_CHANNELS,
    "scaling_factor": 1.0,
}

DENOISER: dict[str, Any] = {
    "sample_size": LATENT_SIZE,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "block_out_channels": (64, 128),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": TEXT_WIDTH,
    "attention_head_dim": (2, 4),  # diffusers' historical name: these are head counts, 32 channels each
    "norm_num_groups": 16,
}

TRANSFORMER: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 4 * LATENT_CHANNELS,
    # Single blocks cost 15 d^2 parameters, joint ones 36 d^2.
    "num_layers": 1,
    "num_single_layers": 7,
    "attention_head_dim": 32,
    "num_attention_heads": 6,
    "joint_attention_dim": TEXT_WIDTH,
    "pooled_projection_dim": TEXT_WIDTH,
    "guidance_embeds": False,
    "axes_dims_rope": (4, 14, 14),
}

TEXT_ENCODER: dict[str, Any] = {
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": TEXT_LENGTH,
    "projection_dim": TEXT_WIDTH,
}

SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}


def autoencoder(**overrides: Any) -> AutoencoderTiny:
    """An untrained autoencoder: images (batch, 3, h, w) in -1..1 to latents (batch, 4, h/8, w/8) and back.

    Convolutions get Kaiming weights with the last one of each residual block scaled by 0.3: under torch's default
    initialisation this network stays at a grey average for hundreds of steps.
    """
    model = AutoencoderTiny(**{**AUTOENCODER, **overrides})
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, parameter in model.named_parameters():
        if name.endswith(".conv.4.weight"):
            parameter.data.mul_(0.3)
    return model


def denoiser(**overrides: Any) -> UNet2DConditionModel:
    """An untrained UNet: noisy latents (batch, 4, 16, 16), timesteps and text (batch, 32, 128) to the noise."""
    return UNet2DConditionModel(**{**DENOISER, **overrides})


def transformer(**overrides: Any) -> FluxTransformer2DModel:
    """An untrained transformer: packed latents (batch, 64, 16), text (batch, 32, 128) and pooled text to a velocity.

    Linear weights are Xavier's; the modulations and the output begin at zero, so that every block is the identity
    and gates open as they learn. diffusers leaves them at torch's random default.
    """
    model = FluxTransformer2DModel(**{**TRANSFORMER, **overrides})
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if ".norm" in name or name.startswith("norm_out") or name == "proj_out":
                nn.init.zeros_(module.weight)
    return model


def text_encoder(vocab_size: int, bos: int, eos: int, **overrides: Any) -> CLIPTextModel:
    """An untrained CLIP text model: token ids (batch, 32) to (batch, 32, 128)."""
    ids = {"vocab_size": vocab_size, "bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos}
    return CLIPTextModel(CLIPTextConfig(**{**TEXT_ENCODER, **ids, **overrides}))


def flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Euler steps of the flow, spent rather on the noisy half (shift 2)."""
    return FlowMatchEulerDiscreteScheduler(shift=2.0)


def scheduler() -> DDIMScheduler:
    """DDIM on the Stable Diffusion noise schedule, predicting noise."""
    return DDIMScheduler(**SCHEDULE)


def fold_whitening(vae: AutoencoderTiny, mean: Tensor, std: Tensor) -> None:
    """Rewrite the autoencoder in place so that its latents are (z - mean) / std, and its images nearly the same.

    The affine map goes into the encoder's last convolution (exactly) and the decoder's first (inexactly: the
    decoder squashes its input by tanh and pads with zeros), so decode is to be trained on a little afterwards.

    Args:
        vae: an autoencoder with scaling_factor 1.
        mean, std: (4,) per latent channel, of the latents before folding.
    """
    with torch.no_grad():
        last, first = vae.encoder.layers[-1], vae.decoder.layers[0]
        last.weight.div_(std[:, None, None, None])
        last.bias.copy_((last.bias - mean) / std)
        first.bias.add_(torch.einsum("oikl,i->o", first.weight, mean))
        first.weight.mul_(std[None, :, None, None])


def fast_decode(decoder: DecoderTiny, z: Tensor) -> Tensor:
    """What `decoder(z)` computes, several times cheaper, except on the outermost ring of pixels.

    The decoder ends in: double the size, convolve 3x3, convolve 3x3, with nothing between. The two convolutions
    are one 5x5 convolution, and after a doubling that is four 3x3 convolutions at half resolution, one per pixel
    parity. The parameters stay the original ones, so gradients reach them. Where the image ends, the original pads
    the middle result with zeros and this does not: finish training with the original.

    Args:
        decoder: a DecoderTiny whose last stage has no residual block.
        z: latents (batch, 4, h, w).

    Returns:
        (batch, 3, 8h, 8w), about -1..1.
    """
    x = torch.tanh(z / 3) * 3
    for layer in decoder.layers[:-3]:
        x = layer(x)
    inner, outer = decoder.layers[-2].weight, decoder.layers[-1].weight
    both = nn.functional.conv_transpose2d(outer, inner)
    # Offset d = -2..2 of the fine grid falls on offset floor((parity + d) / 2) of the coarse one.
    taps = torch.zeros(2, 3, 5, dtype=both.dtype, device=both.device)
    for parity in range(2):
        for d in range(-2, 3):
            taps[parity, (parity + d) // 2 + 1, d + 2] = 1
    coarse = torch.einsum("pyk,oikl,qxl->opqiyx", taps, both, taps).reshape(12, -1, 3, 3)
    x = nn.functional.conv2d(x, coarse, padding=1)
    x = nn.functional.pixel_shuffle(x, 2) + decoder.layers[-1].bias[:, None, None]
    return x.mul(2).sub(1)
