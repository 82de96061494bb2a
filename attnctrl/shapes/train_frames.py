"""Training of the video model's autoencoder, on single frames."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from . import models_video
from .budget import Budget
from .crew import SOLO, Crew
from .frames import decode_frames, encode_frames
from .train_autoencoder import AutoencoderRecipe, fit_autoencoder, reconstruction_psnr


class _FrameCoder(nn.Module):
    """Encoder, noise and decoder as one module, so that gradients can be averaged over processes."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, image: Tensor, noise: Tensor, true_decoder: bool) -> tuple[Tensor, Tensor]:
        z = encode_frames(self.vae, image)
        return z, decode_frames(self.vae, z + models_video.POSTERIOR * noise)


def train_frame_autoencoder(
    out: Path,
    budget: Budget,
    recipe: AutoencoderRecipe,
    device: str = "cpu",
    resume: bool = False,
    crew: Crew = SOLO,
) -> AutoencoderKLWan:
    """Train the autoencoder from scratch on still scenes; checkpoint in `out/autoencoder.pt`.

    Arguments as for `train_autoencoder`. The scenes are those of the images' autoencoder: all shapes in all colours.
    """
    torch.manual_seed(recipe.seed)
    vae = models_video.autoencoder().to(device)
    path = out / "autoencoder.pt"
    fit_autoencoder(vae, _FrameCoder(vae), recipe.lr, path, budget, recipe, device, resume, crew)
    models_video.narrow_posterior(vae)
    return vae


def load_frame_autoencoder(checkpoint: Path) -> AutoencoderKLWan:
    """The autoencoder in a checkpoint, finished or not."""
    vae = models_video.autoencoder()
    vae.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["state"]["vae"])
    models_video.narrow_posterior(vae)
    return vae.eval()


def frame_psnr(vae: AutoencoderKLWan, count: int = 64, seed: int = 9) -> float:
    """Reconstruction quality in dB; see `reconstruction_psnr`."""
    return reconstruction_psnr(lambda image: decode_frames(vae, encode_frames(vae, image)), vae.device, count, seed)
