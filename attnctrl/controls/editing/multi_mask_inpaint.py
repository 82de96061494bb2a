"""Rectified cross-attention: inside a region only its own words are seen, outside of all of them every word."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from attnctrl.control import Control, Where, param
from attnctrl.layout import Regions, resolve
from attnctrl.sampling import Sampling
from attnctrl.sites import Call


def seen_words(tokens: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """What each pixel sees, bool (batch, latent tokens, text tokens).

    tokens: (batch, regions, text tokens) bool, the words of each region; inside: (batch, regions, latent tokens) bool.
    A pixel of some regions sees the words of these and those of no region; a pixel of none sees everything.
    """
    own = torch.einsum("brq,brt->bqt", inside.float(), tokens.float()) > 0
    bound = tokens.any(dim=1)[:, None] & inside.any(dim=1)[:, :, None]
    return own | ~bound


@dataclass(frozen=True)
class MultiMaskInpaint(Control):
    """Rectified cross-attention of I Dream My Painting (Fanelli et al., arXiv 2411.19050), for several masks at once.

    Inside a region the words of the other regions are hidden from every layer that attends to text; special tokens and
    words of no region stay visible, and pixels of no region see everything. Overlaps see the words of all their
    regions. Meant for inpainting pipelines, with the union of the regions as the mask and one prompt that names them
    all, where it is training-free; the paper's gain comes from a LoRA trained with it. `RegionMask` differs in that the
    background does not see the regions' words. Families: those with separate text keys.
    """

    paper: ClassVar[str] = "arXiv 2411.19050"
    fixes: ClassVar[str] = "several masks inpainted at once that exchange what they were to hold"

    where: Where = field(default=Where(kinds=("cross",)), kw_only=True)
    regions: Regions = ()
    weight: float = param(1.0, "how much of the attention to hidden words is removed: logit bias log(1 - weight)", 0, 1)

    @property
    def idle(self) -> bool:
        return self.window.empty or not any(self.regions) or self.weight == 0

    def begin(self, sampling: Sampling) -> Any:
        layout = resolve(sampling, self.regions, self.where)
        seen = {
            grid: seen_words(layout.tokens, layout.mask(grid) >= 0.5)[:, None] for grid in sampling.grids(self.where)
        }
        if self.weight == 1:
            return seen
        hidden = math.log1p(-self.weight)
        return {grid: torch.where(one, 0.0, hidden).to(sampling.dtype) for grid, one in seen.items()}

    def mask(self, call: Call, state: Any) -> torch.Tensor:
        return state[call.queries.grid]
