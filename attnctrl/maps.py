"""Recorded attention of a run: by phrase and step, and as pictures."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from PIL import Image

from attnctrl.pictures import heat_map, sheet
from attnctrl.sites import Grid


@dataclass
class Maps:
    """Attention of phrases during one sampling: `maps["a red circle"]` is (steps, height, width), float32, on the CPU.

    Videos have a frames axis before height. Each map is the mean over heads, over the recorded sites and over the
    phrase's tokens, in the conditional branch; a value is the share of a pixel's attention that a token of the phrase
    gets. tokens: (batch, phrases, text tokens) bool.
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

    @property
    def steps(self) -> list[int]:
        """The recorded steps in the order in which `of` stacks them."""
        return sorted(self._steps)

    def __contains__(self, phrase: object) -> bool:
        return phrase in self.phrases

    def __getitem__(self, phrase: str) -> torch.Tensor:
        return self.of(phrase)

    def of(self, phrase: str, image: int = 0) -> torch.Tensor:
        """(steps, [frames,] height, width) of `phrase` in picture `image` of the batch; KeyError if not recorded."""
        if phrase not in self.phrases or not self._steps or self.grid is None:
            known = ", ".join(f'"{p}"' for p in self.phrases) or "none"
            raise KeyError(
                f'no maps of "{phrase}" were recorded (recorded: {known}): pass control(..., record=["{phrase}"]).'
            )
        column = self.phrases.index(phrase)
        steps = [torch.stack(list(sites.values())).mean(dim=0) for _, sites in sorted(self._steps.items())]
        stacked = torch.stack(steps)[:, image, column]
        return stacked.reshape(len(steps), *(self.grid if self.grid[0] > 1 else self.grid[1:]))

    def heat(self, phrase: str, image: int = 0, size: tuple[int, int] = (256, 256)) -> torch.Tensor:
        """What `phrase` gets of each pixel's attention, mean over layers, steps and frames; as in DAAM (2210.04885).

        size: (width, height) in pixels -> (height, width) float32, enlarged bicubically and never below 0.
        """
        maps = self.of(phrase, image).flatten(0, -3).mean(dim=0)
        width, height = size
        return F.interpolate(maps[None, None], size=(height, width), mode="bicubic")[0, 0].clamp(min=0)

    def picture(self, phrase: str, image: int = 0, size: tuple[int, int] = (256, 256)) -> Image.Image:
        """`heat` as colours, min-max normalised, of `size` (width, height) pixels."""
        return heat_map(self.heat(phrase, image, size), size)

    def overlay(self, picture: Image.Image, phrase: str, image: int = 0, strength: float = 0.6) -> Image.Image:
        """The heat map of `phrase` laid over the generated picture; strength in [0, 1]."""
        heat = self.picture(phrase, image, picture.size)
        return Image.blend(picture.convert("RGB"), heat, strength)

    def overlays(self, picture: Image.Image, image: int = 0, columns: int = 4) -> Image.Image:
        """The picture and beside it the overlay of every recorded phrase, named, on one sheet."""
        shown = [("", picture), *((phrase, self.overlay(picture, phrase, image)) for phrase in self.phrases)]
        return sheet(shown, min(columns, len(shown)))
