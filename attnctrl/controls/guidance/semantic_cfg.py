"""Semantic-aware guidance: a guidance scale for each region that the attention shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F

from attnctrl.control import Control, Where, param
from attnctrl.controls.guidance.common import selected
from attnctrl.controls.reading import before, own_map, text_shares
from attnctrl.errors import ControlError
from attnctrl.guidance import Prediction
from attnctrl.sampling import Sampling
from attnctrl.sites import Call, Grid, Site, Step
from attnctrl.stepmaps import SelfMap, blur

POWERS = {"code": (0.25, 0.75), "paper": (0.25, 0.25, 0.25, 0.25)}
"""The weights of S, S^2, ...: the paper's loop over four powers multiplies by S once in the code."""
NEAR = (1 / 16, 1 / 64)
"""The grids that are read, as shares of the latents: 16x16 and 8x8 of 64x64."""


def propagated(cross: torch.Tensor, own: SelfMap | None, weights: Sequence[float]) -> torch.Tensor:
    """The sum over i of weights[i] S^(i+1) C: text maps carried on by self-attention, without its matrix.

    cross: C, (batch, tokens, text tokens). own: S; None leaves C as it is.
    """
    if own is None:
        return cross
    total, carried = torch.zeros_like(cross), cross
    for weight in weights:
        carried = own.apply(carried)
        total = total + weight * carried
    return total


def relative(maps: torch.Tensor) -> torch.Tensor:
    """Each text token's map (..., tokens) by its own mean."""
    return maps / (maps.mean(dim=-1, keepdim=True) + 1e-8)


def foreground(maps: torch.Tensor) -> torch.Tensor:
    """Where the first token's map is not larger than that of all others together, each by its mean; everywhere if that
    is nowhere. maps: (batch, text tokens, tokens) -> (batch, tokens) bool."""
    first, others = relative(maps[:, 0]), relative(maps[:, 1:].sum(dim=1))
    inside = first <= others
    return inside | ~inside.any(dim=-1, keepdim=True)


def region_rates(
    norm: torch.Tensor, regions: torch.Tensor, inside: torch.Tensor, low: float, high: float
) -> torch.Tensor:
    """The mean norm of the foreground over that of the pixel's region, clamped to at least `low`, then at most `high`.

    norm: (batch, pixels) of cond - uncond; regions: (batch, pixels) numbers of regions; inside: bool, the foreground.
    """
    count = int(regions.max()) + 1
    sums = torch.zeros(len(norm), count, device=norm.device).scatter_add(1, regions, norm)
    sizes = torch.zeros_like(sums).scatter_add(1, regions, torch.ones_like(norm))
    means = (sums / sizes.clamp(min=1)).gather(1, regions)
    wanted = (norm * inside).sum(dim=1, keepdim=True) / inside.sum(dim=1, keepdim=True)
    return (wanted / (means + 1e-8)).clamp(min=low).clamp(max=high)


@dataclass
class State:
    """pairs: layers with text and the self-attention before each. What was read in a step, by branch and site."""

    pairs: list[tuple[Site, Site | None]]
    cross: dict[tuple[str, str], tuple[torch.Tensor, Grid]] = field(default_factory=dict)
    own: dict[tuple[str, str], SelfMap] = field(default_factory=dict)

    def maps(self, branch: str, weights: Sequence[float]) -> tuple[torch.Tensor, Grid]:
        """The mean over layers of the carried, blurred maps, (batch, text tokens, tokens), and the finest grid."""
        there = [(c, s) for c, s in self.pairs if (branch, c.name) in self.cross]
        grid = max((self.cross[branch, c.name][1] for c, _ in there), key=lambda g: g[1] * g[2])
        total: torch.Tensor | float = 0.0
        for site, earlier in there:
            probs, own_grid = self.cross[branch, site.name]
            own = None if earlier is None else self.own.get((branch, earlier.name))
            maps = propagated(probs, own, weights).transpose(1, 2)
            frames = maps.reshape(len(maps), -1, *own_grid[1:])
            if own_grid != grid:
                frames = F.interpolate(frames, size=grid[1:], mode="bilinear", align_corners=False)
            total = total + relative(blur(frames.reshape(len(maps), maps.shape[1], -1), grid))
        assert isinstance(total, torch.Tensor)
        return total / len(there), grid


@dataclass(frozen=True)
class SemanticCFG(Control):
    """Semantic-aware classifier-free guidance (Shen et al., CVPR 2024): all regions are guided equally strongly.

    Each latent pixel belongs to the text token whose attention map, carried on by self-attention, is largest relative
    to its mean. Where n is the norm of cond - uncond over channels, a region's guidance scale is multiplied by the
    mean n of the foreground over the region's, between 0.8 and 3 and such that the scale ends at `ceiling`. The
    foreground is where, in the unconditional branch, the first token's map is not the largest. No further prediction
    is made.

    Departures: of equal maps the first token gets the pixel, where the code counts it twice; a foreground of nothing is
    the whole picture; grids nearest to the shares 1/16 and 1/64 of the latents, so any size. In joint attention the
    maps are shares of the attention to text; where text has no start token, the first token is whichever opens the
    unconditional text. Where a layer with text has no self-attention before it (SANA), its map is not carried on. All
    these layers' maps are kept until the step ends: narrow `where` on large transformers.
    Needs classifier-free guidance. Families: all.
    """

    paper: ClassVar[str] = "CVPR 2024, S-CFG"
    fixes: ClassVar[str] = "some parts over-, others underguided"

    weight: float = param(1.0, "how far each region's scale moves; 0 is one scale for all", 0, 1)
    low: float = param(0.8, "smallest factor of the guidance scale", 0, 1)
    high: float = param(3.0, "largest factor of the guidance scale", 1, 100)
    ceiling: float = param(15.0, "guidance scale that no region exceeds", 0, 1000)
    variant: str = param("code", "powers of self-attention: 1 and 2 (code), or 1 to 4 (paper)", choices=tuple(POWERS))
    where: Where = field(default=Where(kinds=("cross", "self", "joint")), kw_only=True)
    branches: tuple[str, ...] = field(default=("cond", "uncond"), kw_only=True)

    @property
    def idle(self) -> bool:
        return self.window.empty or self.weight == 0

    def begin(self, sampling: Sampling) -> State:
        text = tuple(kind for kind in self.where.kinds if kind != "self")
        chosen = {s.name: s for n in NEAR for s in selected(self, sampling, replace(self.where, kinds=text, near=n))}
        others = replace(self.where, kinds=("self",)).select(sampling.sites, sampling.latent_grid)
        others = others if "self" in self.where.kinds else []
        return State([(site, before(site, others)) for site in chosen.values()])

    def sites(self, sampling: Sampling) -> list[Site]:
        names = {site.name for pair in self.begin(sampling).pairs for site in pair if site is not None}
        return [site for site in sampling.sites if site.name in names]

    def inputs(self, call: Call, state: State) -> Call:
        at, grid = (call.branch, call.site.name), call.queries.grid
        assert grid is not None
        if call.site.kind != "self":
            state.cross[at] = text_shares(call), grid
        if call.site.kind != "cross":
            state.own[at] = own_map(call)
        return call

    def guide(self, prediction: Prediction, step: Step, state: State) -> torch.Tensor:
        if prediction.uncond is None:
            raise ControlError("SemanticCFG scales classifier-free guidance, which is off: raise the guidance scale.")
        maps, grid = state.maps("cond", POWERS[self.variant])
        inside = foreground(state.maps("uncond", POWERS[self.variant])[0])
        state.cross.clear()
        state.own.clear()
        assert prediction.textless is not None
        apart = (prediction.own - prediction.textless).float()
        shape = apart.shape[2:] if apart.ndim == 5 else (1, *apart.shape[2:])
        scale = prediction.scale
        regions, inside = (
            F.interpolate(one.float().reshape(-1, 1, *grid), size=shape, mode="nearest").flatten(1)
            for one in (maps.argmax(dim=1), inside)
        )
        high = min(self.high, self.ceiling / scale) if scale > 0 else self.high
        rates = region_rates(apart.norm(dim=1).flatten(1), regions.long(), inside > 0, self.low, high)
        rates = blur(rates[:, None], (shape[0], shape[1], shape[2])).reshape(-1, 1, *apart.shape[2:])
        return prediction.combined + self.weight * scale * (rates - 1) * apart
