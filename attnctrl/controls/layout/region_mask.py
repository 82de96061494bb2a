"""Cross-attention masking: the words of a region are seen only inside it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from attnctrl.control import Control, Where, Window, param
from attnctrl.layout import Layout, Regions, resolve
from attnctrl.sampling import Sampling
from attnctrl.sites import Call


def region_bias(tokens: torch.Tensor, masks: torch.Tensor, weight: float, boost: float) -> torch.Tensor:
    """What is added to the logits: log(1 - weight) outside a token's regions, `boost` inside, 0 for free tokens.

    tokens: (batch, regions, text tokens) bool; masks: (batch, regions, latent tokens) in [0, 1], inside at 0.5 or
    more. A token of several regions belongs to all of them. -> (batch, latent tokens, text tokens) float32.
    """
    member = tokens.float()
    inside = (torch.einsum("brt,brn->bnt", member, (masks >= 0.5).float())) > 0
    bound = tokens.any(dim=1)[:, None]
    outside = math.log1p(-weight) if weight < 1 else float("-inf")
    bias = torch.zeros(inside.shape, device=masks.device)
    return bias.masked_fill(bound & inside, boost).masked_fill(bound & ~inside, outside)


@dataclass(frozen=True)
class RegionMask(Control):
    """Hide the words of each region from the pixels outside it, in every cross-attention layer.

    The masked form of regional attention, as in rectified cross-attention (I Dream My Painting, arXiv 2411.10162) and
    Omost's score masks. Special tokens and words of no region stay visible everywhere: they carry the summary of the
    sentence and the background. Pixels of no region see those only. Overlaps see the words of all their regions.
    Families: every one with text keys. Works under torch.compile.
    """

    paper: ClassVar[str] = "arXiv 2411.10162"
    fixes: ClassVar[str] = "objects in the wrong place, attributes leaking between objects"

    regions: Regions = ()
    weight: float = param(1.0, "how much of the attention from outside is removed: logit bias log(1 - weight)", 0, 1)
    boost: float = param(6.0, "logit bias inside the region", 0, 20)
    window: Window = field(default=Window(0.0, 0.8), kw_only=True)
    where: Where = field(default=Where(kinds=("cross",)), kw_only=True)

    @property
    def idle(self) -> bool:
        return self.window.empty or not any(self.regions) or (self.weight == 0 and self.boost == 0)

    def begin(self, sampling: Sampling) -> Any:
        layout = resolve(sampling, self.regions, self.where)
        return {grid: self._bias(layout, grid, sampling.dtype) for grid in sampling.grids(self.where)}

    def _bias(self, layout: Layout, grid: Any, dtype: torch.dtype) -> torch.Tensor:
        bias = region_bias(layout.tokens, layout.mask(grid), self.weight, self.boost)[:, None]
        # A boolean mask where nothing but visibility is asked: kernels can skip what it forbids.
        return bias == 0 if self.weight == 1 and self.boost == 0 else bias.to(dtype)

    def mask(self, call: Call, state: Any) -> torch.Tensor:
        return state[call.queries.grid]
