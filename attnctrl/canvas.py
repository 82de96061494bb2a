"""Given pictures as a run needs them, and back: any size and mode in, the same size out, pixel by pixel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageFilter, ImageOps

from attnctrl.errors import ControlError
from attnctrl.regions import Region


@dataclass(frozen=True)
class Canvas:
    """A given picture and the form of it that a model can take.

    picture: upright, RGB, of the size in which it was given. alpha: its transparency, None if it has none. padded: with
    its last rows and columns repeated up to whole latents; nothing is resized, so no pixel moves.
    """

    picture: Image.Image
    alpha: Image.Image | None
    padded: Image.Image

    @classmethod
    def of(cls, source: Any, multiple: int) -> Canvas:
        """source: a PIL picture, or an array (height, width[, channels]) of bytes or of floats in 0..1.

        Raises ControlError for anything else, and for pictures smaller than one latent.
        """
        picture = as_picture(source)
        alpha = picture.convert("RGBA").getchannel("A") if picture.has_transparency_data else None
        picture = picture.convert("RGB")
        if min(picture.size) < multiple:
            raise ControlError(
                f"the picture is {picture.width}x{picture.height} pixels, less than one latent of "
                f"{multiple}x{multiple}: enlarge it."
            )
        right, below = -picture.width % multiple, -picture.height % multiple
        pixels = np.pad(np.asarray(picture), ((0, below), (0, right), (0, 0)), mode="edge")
        return cls(picture, alpha, Image.fromarray(pixels))

    def mask(self, mask: Any) -> Image.Image:
        """A mask of any kind that `Region` takes, for the picture as it was given: white inside, of its size.

        Raises ControlError for masks of another aspect ratio, empty ones and ones with NaN.
        """
        height, width = self.picture.height, self.picture.width
        region = Region("the edit", mask=mask)
        region.check_aspect(height, width)
        return Image.fromarray((region.raster(height, width, "nearest").numpy() * 255).astype(np.uint8))

    def padded_mask(self, mask: Image.Image) -> Image.Image:
        """The mask for the padded picture."""
        whole = Image.new("L", self.padded.size)
        whole.paste(mask)
        return whole

    def finish(self, drawn: Image.Image, mask: Image.Image | None, feather: int) -> Image.Image:
        """What the model drew, in the given picture's size; outside `mask` the given pixels, byte for byte.

        feather: over how many pixels outwards from the mask the two blend.
        """
        drawn = drawn.convert("RGB").crop((0, 0, *self.picture.size))
        if mask is not None:
            drawn = Image.composite(drawn, self.picture, feathered(mask, feather))
        if self.alpha is not None:
            drawn.putalpha(self.alpha)
        return drawn


def feathered(mask: Image.Image, feather: int) -> Image.Image:
    """The mask with a soft edge outwards: 255 inside, falling to 0 over `feather` pixels, 0 beyond."""
    if feather < 1:
        return mask
    reach = mask.filter(ImageFilter.MaxFilter(2 * feather + 1))
    soft = mask.filter(ImageFilter.MaxFilter(2 * (feather // 2) + 1)).filter(ImageFilter.GaussianBlur(feather / 2))
    return ImageChops.lighter(mask, ImageChops.darker(soft, reach))


def as_picture(source: Any) -> Image.Image:
    """A PIL picture, or one of an array: upright, with eight bits a channel. Raises ControlError for anything else."""
    if isinstance(source, Image.Image):
        if source.mode in ("I", "F"):
            raise ControlError(
                f'the picture is of mode "{source.mode}", whose range is not known: save it with 8 or 16 bits.'
            )
        upright = ImageOps.exif_transpose(source)
        # Pillow's own conversion of 16 bits is white from 255 on.
        return Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8)) if upright.mode[:2] == "I;" else upright
    array = np.asarray(source)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (1, 3, 4)):
        raise ControlError(
            f"the picture has shape {array.shape}: give a PIL picture or an array (height, width) or (height, width, "
            "channels)."
        )
    if array.dtype.kind == "f":
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise ControlError("the picture has values outside 0..1: scale it, or give bytes.")
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise ControlError(f"the picture is of type {array.dtype}: give bytes, or floats in 0..1.")
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array)
