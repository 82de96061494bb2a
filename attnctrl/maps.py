"""Recorded attention of a run: by phrase and step, and as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from attnctrl.sites import Grid

# Control points of a dark-to-bright colour ramp (position, red, green, blue).
RAMP = ((0.0, 13, 8, 60), (0.35, 126, 3, 168), (0.65, 225, 100, 60), (1.0, 252, 250, 160))


@dataclass
class Maps:
    """Attention of phrases during one sampling: `maps["a red circle"]` is (steps, height, width), float32, on the CPU.

    Each map is the mean over heads, over the recorded sites and over the phrase's tokens, in the conditional branch;
    a value is the share of a pixel's attention that a token of the phrase gets. tokens: (batch, phrases, text tokens)
    bool.
    """

    phrases: tuple[str, ...] = ()
    tokens: torch.Tensor | None = None
    grid: Grid | None = None
    _steps: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)

    def add(self, step: int, site: str, maps: torch.Tensor, grid: Grid) -> None:
        """Keep the maps (batch, phrases, latent tokens) of one site and step; a repeated call replaces them."""
        self.grid = grid
        self._steps.setdefault(step, {})[site] = maps.detach().float().cpu()

    def __len__(self) -> int:
        return len(self._steps)

    def __contains__(self, phrase: object) -> bool:
        return phrase in self.phrases

    def __getitem__(self, phrase: str) -> torch.Tensor:
        return self.of(phrase)

    def of(self, phrase: str, image: int = 0) -> torch.Tensor:
        """(steps, height, width) of `phrase` in picture `image` of the batch; KeyError if it was not recorded."""
        if phrase not in self.phrases or not self._steps or self.grid is None:
            known = ", ".join(f'"{p}"' for p in self.phrases) or "none"
            raise KeyError(
                f'no maps of "{phrase}" were recorded (recorded: {known}): pass control(..., record=["{phrase}"]).'
            )
        column = self.phrases.index(phrase)
        steps = [torch.stack(list(sites.values())).mean(dim=0) for _, sites in sorted(self._steps.items())]
        stacked = torch.stack(steps)[:, image, column]
        return stacked.reshape(len(steps), self.grid[1], self.grid[2])

    def picture(self, phrase: str, image: int = 0, size: tuple[int, int] = (256, 256)) -> Image.Image:
        """The mean over steps as a heat map, min-max normalised, of `size` (width, height) pixels."""
        mean = self.of(phrase, image).mean(dim=0)
        return heat_map(mean, size)

    def overlay(self, picture: Image.Image, phrase: str, image: int = 0, strength: float = 0.6) -> Image.Image:
        """The heat map of `phrase` laid over the generated picture; strength in [0, 1]."""
        heat = self.picture(phrase, image, picture.size)
        return Image.blend(picture.convert("RGB"), heat, strength)


def heat_map(values: torch.Tensor, size: tuple[int, int]) -> Image.Image:
    """A (height, width) tensor as a coloured picture of `size` (width, height); constant maps come out dark."""
    low, high = float(values.min()), float(values.max())
    unit = (values - low) / (high - low) if high > low else torch.zeros_like(values)
    grey = Image.fromarray((unit.numpy() * 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    position = np.asarray(grey, dtype=np.float32) / 255
    stops = np.array(RAMP)
    channels = [np.interp(position, stops[:, 0], stops[:, c]) for c in (1, 2, 3)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def contact_sheet(pictures: Sequence[Image.Image], columns: int, gap: int = 8) -> Image.Image:
    """Pictures of one size on a white sheet, row by row."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for i, picture in enumerate(pictures):
        row, column = divmod(i, columns)
        sheet.paste(picture.convert("RGB"), (gap + column * (width + gap), gap + row * (height + gap)))
    return sheet
