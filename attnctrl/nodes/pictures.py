"""Pictures and masks between ComfyUI's tensors and attnctrl."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from attnctrl.errors import ControlError
from attnctrl.nodes.plan import Recorded


def as_pictures(image: torch.Tensor) -> list[Image.Image]:
    """IMAGE, (batch, height, width, channels) of floats in [0, 1], as PIL pictures."""
    bytes_ = (image.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return [Image.fromarray(one[..., 0] if one.shape[-1] == 1 else one) for one in bytes_]


def as_image(pictures: Sequence[Any]) -> torch.Tensor:
    """PIL pictures or arrays of one size as IMAGE; three channels."""
    arrays = [np.asarray(p.convert("RGB")) if isinstance(p, Image.Image) else np.asarray(p) for p in pictures]
    floats = [a.astype(np.float32) / 255 if a.dtype == np.uint8 else a.astype(np.float32) for a in arrays]
    return torch.from_numpy(np.stack(floats))


def mask_picture(mask: torch.Tensor) -> Image.Image:
    """The first of a MASK, (batch, height, width) in [0, 1], as a picture, white inside."""
    first = mask if mask.ndim == 2 else mask[0]
    return Image.fromarray((first.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8).numpy())


def heat_maps(maps: Recorded, image: torch.Tensor, strength: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The maps of every phrase over every picture: IMAGE and MASK, (phrases * pictures, height, width[, 3]).

    A mask is the map from its smallest value, 0, to its largest, 1.
    Raises ControlError where nothing was recorded, and for other numbers of pictures than were sampled.
    """
    found = maps.maps
    if found is None or not len(found):
        raise ControlError("no maps were recorded: sample with the model of the node Record attention maps first.")
    assert found.tokens is not None
    pictures = as_pictures(image)
    if len(pictures) != found.tokens.shape[0]:
        raise ControlError(
            f"maps of {found.tokens.shape[0]} pictures were recorded, and {len(pictures)} are connected."
        )
    shown, masks = [], []
    for phrase in found.phrases:
        for i, picture in enumerate(pictures):
            shown.append(found.overlay(picture, phrase, i, strength))
            heat = found.heat(phrase, i, picture.size)
            masks.append((heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-12))
    return as_image(shown), torch.stack(masks)
