"""Given pictures as clean latents, in the form in which controls see latents; and latents as pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from attnctrl.errors import ControlError

if TYPE_CHECKING:
    from attnctrl.processors.family import Family
    from attnctrl.sites import Grid


def clean_latents(pipe: Any, family: Family, source: Any, like: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The latents (batch or 1, channels, height, width) of a picture for predictions of the shape of `like`.

    source: latents as the pipeline returns them for output_type="latent", or in the form of `like`; or a picture, or
    one per picture of the batch, of any kind that the pipeline's image processor takes. Raises ControlError for
    latents of another shape and for autoencoders whose scaling we do not know.
    """
    if isinstance(source, torch.Tensor):
        packed = source.ndim == 3 and source.shape[1] == grid[1] * grid[2]
        latents = family.unpacked(source, grid) if packed else source
    else:
        factor = pipe.vae_scale_factor
        latents = encode_picture(pipe, source, like.shape[-2] * factor, like.shape[-1] * factor)
    if latents.shape[1:] != like.shape[1:] or len(latents) not in (1, len(like)):
        raise ControlError(
            f"the source has latents of shape {tuple(latents.shape)}, this run has {tuple(like.shape)}: give one for "
            "all pictures or one for each, of the size of the run."
        )
    return latents.to(like.device)


def encode_picture(pipe: Any, source: Any, height: int, width: int) -> torch.Tensor:
    """The latents (pictures, channels, rows, columns) of a picture resized to height x width pixels, as a denoiser
    sees them at the end of a run. Raises ControlError for autoencoders whose scaling we do not know.
    """
    vae = pipe.vae
    pixels = pipe.image_processor.preprocess(source, height=height, width=width)
    pixels = pixels.to(vae.device, vae.dtype)
    config = vae.config
    with torch.no_grad():
        if "latents_mean" in config and config.latents_mean is not None:
            # A video autoencoder: a picture is one frame.
            mean, std = (torch.tensor(v, device=vae.device)[:, None, None] for v in _statistics(config))
            encoded = vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]
            return (encoded - mean) / std
        encoded = vae.encode(pixels)
    if hasattr(encoded, "latent_dist"):
        latents = encoded.latent_dist.mode()
    else:
        latents = encoded.latent if hasattr(encoded, "latent") else encoded.latents
    if "scaling_factor" not in config:
        raise ControlError(f"how {type(vae).__name__} scales its latents is not known: give latents as the source.")
    return (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor


def _statistics(config: Any) -> tuple[list[float], list[float]]:
    return config.latents_mean, config.latents_std


def decode_latents(pipe: Any, latents: torch.Tensor) -> Any:
    """The reverse of `encode_picture`: PIL pictures of latents (pictures, channels, rows, columns).

    Raises ControlError for autoencoders whose scaling we do not know.
    """
    vae = pipe.vae
    config, latents = vae.config, latents.to(vae.device, vae.dtype)
    with torch.no_grad():
        if "latents_mean" in config and config.latents_mean is not None:
            mean, std = (torch.tensor(v, device=vae.device)[:, None, None] for v in _statistics(config))
            pixels = vae.decode((latents * std + mean)[:, :, None], return_dict=False)[0][:, :, 0]
        elif "scaling_factor" in config:
            scaled = latents / config.scaling_factor + (config.get("shift_factor") or 0.0)
            pixels = vae.decode(scaled, return_dict=False)[0]
        else:
            raise ControlError(f"how {type(vae).__name__} scales its latents is not known.")
    # Pipelines to clips from a picture have an image processor too, the picture's.
    processor = pipe.video_processor if hasattr(pipe, "video_processor") else pipe.image_processor
    return processor.postprocess(pixels, output_type="pil")
