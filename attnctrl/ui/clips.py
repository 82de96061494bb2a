"""Clips for people: their frames in a row, alone and under heat maps."""

from __future__ import annotations

import torch.nn.functional as F
from PIL import Image

from attnctrl.maps import Maps
from attnctrl.pictures import heat_map
from attnctrl.ui.result import Clip

SHOWN = 9
"""Frames of a row; of longer clips these are spread over the whole."""

SIDE = 256
"""Most pixels of the height of a row."""


def strip(clip: Clip) -> Image.Image:
    """Frames of a clip in a row, from the first to the last."""
    scale = min(1.0, SIDE / clip[0].height)
    width, height = (max(1, round(side * scale)) for side in clip[0].size)
    row = Image.new("RGB", (width * min(SHOWN, len(clip)), height))
    for place, index in enumerate(spread(len(clip))):
        row.paste(clip[index].convert("RGB").resize((width, height)), (place * width, 0))
    return row


def heated(clip: Clip, maps: Maps, phrase: str, strength: float = 0.6) -> Image.Image:
    """The row of `strip` under what `phrase` gets of each frame's attention, mean over steps, as of one scale.

    maps: recorded, (steps, frames, height, width); frames of the latents stand for several of the clip.
    """
    heat = maps.of(phrase).mean(dim=0)
    latent = [round(index * (len(heat) - 1) / max(1, len(clip) - 1)) for index in spread(len(clip))]
    size = clip[0].size
    enlarged = F.interpolate(heat[latent, None], size=size[::-1], mode="bicubic")[:, 0].clamp(min=0)
    limits = float(enlarged.min()), float(enlarged.max())
    row = strip([heat_map(one, size, limits) for one in enlarged])
    return Image.blend(strip(clip), row, strength)


def spread(count: int) -> list[int]:
    """At most `SHOWN` numbers of frames among `count`, the first and the last among them."""
    shown = min(SHOWN, count)
    return [round(place * (count - 1) / max(1, shown - 1)) for place in range(shown)]
