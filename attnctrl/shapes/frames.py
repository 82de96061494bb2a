"""The video autoencoder on single frames: what AutoencoderKLWan computes for one, by convolutions in two dimensions.

A clip's first frame has zeros before it, so of every causal convolution only the last tap counts. Training on single
frames costs a third this way, and leaves the other taps at zero.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanCausalConv3d,
    WanMidBlock,
    WanResample,
    WanResidualBlock,
    WanRMS_norm,
    WanUpBlock,
    patchify,
    unpatchify,
)
from torch import Tensor, nn
from torch.nn import functional


def encode_frames(vae: AutoencoderKLWan, images: Tensor) -> Tensor:
    """The mode of `vae.encode` for pictures, each a clip of one frame: (n, 3, h, w) in -1..1 to (n, z, h/8, w/8)."""
    patches = patchify(images[:, :, None], vae.config.patch_size or 1)[:, :, 0]
    states = _applied(vae.encoder.conv_in, patches.contiguous(memory_format=torch.channels_last))
    for block in (*vae.encoder.down_blocks, vae.encoder.mid_block):
        states = _applied(block, states)
    return _applied(vae.quant_conv, _ended(vae.encoder, states)).chunk(2, dim=1)[0]


def decode_frames(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """`vae.decode` for pictures, but for its clamp to -1..1: (n, z, h, w) to (n, 3, 8h, 8w)."""
    states = _applied(vae.post_quant_conv, latents)
    for block in (vae.decoder.conv_in, vae.decoder.mid_block, *vae.decoder.up_blocks):
        states = _applied(block, states)
    return unpatchify(_ended(vae.decoder, states)[:, :, None], vae.config.patch_size or 1)[:, :, 0]


def _ended(half: Any, states: Tensor) -> Tensor:
    """Through the last norm and convolution of an encoder or decoder."""
    return _applied(half.conv_out, functional.silu(_applied(half.norm_out, states)))


def _applied(module: nn.Module, states: Tensor) -> Tensor:
    """What a module of the autoencoder makes of single frames, (n, channels, h, w).

    Raises:
        TypeError: the module is none that an AutoencoderKLWan like ours has.
    """
    if isinstance(module, WanCausalConv3d):
        across, down = module._padding[0], module._padding[2]
        return functional.conv2d(states, module.weight[:, :, -1], module.bias, padding=(down, across))
    if isinstance(module, WanRMS_norm):
        return functional.normalize(states, dim=1) * module.scale * module.gamma.view(1, -1, 1, 1)
    if isinstance(module, WanResidualBlock):
        inner = _applied(module.conv1, functional.silu(_applied(module.norm1, states)))
        inner = _applied(module.conv2, functional.silu(_applied(module.norm2, inner)))
        return _applied(module.conv_shortcut, states) + inner
    if isinstance(module, WanAttentionBlock):
        return module(states[:, :, None])[:, :, 0]
    if isinstance(module, WanMidBlock):
        states = _applied(module.resnets[0], states)
        for attention, resnet in zip(module.attentions, module.resnets[1:], strict=True):
            states = _applied(resnet, _applied(attention, states))
        return states
    if isinstance(module, WanResample):
        return module.resample(states)
    if isinstance(module, WanUpBlock):
        for block in (*module.resnets, *(module.upsamplers or ())):
            states = _applied(block, states)
        return states
    if isinstance(module, nn.Identity):
        return states
    raise TypeError(f"{type(module).__name__} has no form for single frames.")
