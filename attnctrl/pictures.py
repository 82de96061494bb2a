"""Pictures for people: heat maps, regions drawn on images, and sheets of images with titles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from attnctrl.regions import Region

# Control points of a dark-to-bright colour ramp (position, red, green, blue).
RAMP = ((0.0, 13, 8, 60), (0.35, 126, 3, 168), (0.65, 225, 100, 60), (1.0, 252, 250, 160))
OUTLINES = ("#e6007a", "#0077ff", "#00a36c", "#ff8c00", "#7a00e6", "#00b8d4")


def heat_map(values: torch.Tensor, size: tuple[int, int], limits: tuple[float, float] | None = None) -> Image.Image:
    """A (height, width) tensor as a coloured picture of `size` (width, height); constant maps come out dark.

    limits: what is darkest and brightest; None for the least and the largest value.
    """
    low, high = (float(values.min()), float(values.max())) if limits is None else limits
    unit = (values - low) / (high - low) if high > low else torch.zeros_like(values)
    grey = Image.fromarray((unit.numpy() * 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    position = np.asarray(grey, dtype=np.float32) / 255
    stops = np.array(RAMP)
    channels = [np.interp(position, stops[:, 0], stops[:, c]) for c in (1, 2, 3)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def with_regions(picture: Image.Image, regions: Sequence[Region], side: int = 256) -> Image.Image:
    """The picture, enlarged to `side` pixels on its shorter side, with every region outlined and named."""
    scale = max(1.0, side / min(picture.size))
    size = (round(picture.width * scale), round(picture.height * scale))
    drawn = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    pen, font = ImageDraw.Draw(drawn), ImageFont.load_default(size=max(10, side // 20))
    for region, colour in zip(regions, OUTLINES * len(regions), strict=False):
        x, y = _outline(drawn, pen, region, colour)
        box = pen.textbbox((x, y), region.phrase, font=font)
        pen.rectangle((box[0] - 2, box[1] - 1, box[2] + 2, box[3] + 2), fill=colour)
        pen.text((x, y), region.phrase, fill="white", font=font)
    return drawn


def _outline(picture: Image.Image, pen: ImageDraw.ImageDraw, region: Region, colour: str) -> tuple[float, float]:
    """Draw the border of a region; returns where its name goes."""
    width, height = picture.size
    if region.box is not None:
        x0, y0, x1, y1 = (v * s for v, s in zip(region.box, (width, height) * 2, strict=True))
        pen.rectangle((x0, y0, x1 - 1, y1 - 1), outline=colour, width=2)
        return x0 + 3, y0 + 2
    inside = region.raster(height, width, "nearest").bool()
    padded = torch.nn.functional.pad(inside, (1, 1, 1, 1))
    core = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    border = Image.fromarray(((inside & ~core).numpy() * 255).astype(np.uint8))
    picture.paste(Image.new("RGB", picture.size, colour), mask=border)
    rows, columns = torch.nonzero(inside, as_tuple=True)
    return float(columns.min()) + 3, float(rows.min()) + 2


def sheet(pictures: Sequence[tuple[str, Image.Image]], columns: int, gap: int = 10) -> Image.Image:
    """Titled pictures of one size on a white sheet, row by row."""
    width, height = pictures[0][1].size
    letters = max(11, height // 18)
    font, title = ImageFont.load_default(size=letters), int(letters * 1.6)
    rows = -(-len(pictures) // columns)
    size = (columns * (width + gap) + gap, rows * (height + title + gap) + gap)
    page = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(page)
    for i, (name, picture) in enumerate(pictures):
        row, column = divmod(i, columns)
        x, y = gap + column * (width + gap), gap + row * (height + title + gap)
        pen.text((x, y), name, fill="black", font=font)
        page.paste(picture.convert("RGB"), (x, y + title))
    return page
