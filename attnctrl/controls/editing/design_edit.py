"""DesignEdit: objects removed, moved, resized and flipped as layers of latents, and the background filled in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from PIL import Image

from attnctrl.control import Control, Where, param
from attnctrl.controls.editing.sources import Sources, on_trajectory
from attnctrl.errors import ControlError
from attnctrl.kernels import combine_masks
from attnctrl.layers import Layer, shifted
from attnctrl.regions import Region
from attnctrl.sampling import Sampling
from attnctrl.sites import Call, Grid, Step

PIXELS = 8
"""Masks are reshaped on a raster of so many pixels for each latent."""


def pasted(canvas: torch.Tensor, layer: torch.Tensor, inside: torch.Tensor, down: int, right: int) -> torch.Tensor:
    """A layer of latents and its mask, both moved by whole cells, laid over a canvas; all (..., height, width)."""
    return torch.where(shifted(inside.float(), down, right) > 0, shifted(layer, down, right), canvas)


@dataclass
class Cut:
    """A layer that is pasted. inside: bool (height, width) of the latents, before the move by `down` and `right` cells;
    trajectory: number of its own, None where the source's latents are its.
    """

    inside: torch.Tensor
    down: int
    right: int
    trajectory: int | None


@dataclass
class State:
    """hidden: by grid, the share of each latent token that is masked, in the early steps and in the later ones, both
    (tokens,) in 0..1. hole: bool (height, width) of the latents.
    """

    sources: Sources
    hidden: dict[Grid, tuple[torch.Tensor, torch.Tensor]]
    hole: torch.Tensor
    cuts: list[Cut]
    pasted: bool = False
    free: torch.Tensor = field(default_factory=lambda: torch.zeros(0))


@dataclass(frozen=True)
class DesignEdit(Control):
    """DesignEdit (Jia et al., arXiv 2403.14487): multi-layered latent decomposition and fusion.

    The run draws the source and its edit together: prompt=[source, edit]. (1) Until `mask_until` the edit's
    self-attention has the keys of the objects masked, so that the holes are filled from around them: "zero-key"
    multiplies a key by 1 - m, m being the share of it that is masked, as the code does: its logit is 0 and its value
    still counts a little; "-inf" hides it where m is at least half. Either in the conditional branch alone.
    (2) Until `fuse_at` everything outside the holes is the source's after every step. (3) Then, once, the layers are
    pasted in order, the next over the one before: the source's latents, moved by whole latents. A layer that is resized
    or flipped comes from the trajectory of the picture resized and flipped about it, of which `trajectories` has one
    for each such layer, (steps + 1, 1, channels, height, width) from noise to picture; EditPipeline makes them.
    (4) In the steps that are left the latents outside the holes and the layers are pulled to the source's by `pull`,
    and the edit sees the source's text where anything was pasted. So the prompt of the edit says what fills the holes:
    the source's without the objects, or nothing, which is the paper's for everything.
    `refine` hides more, such as shadows, in the first half of the run.
    Departures: the background and the canvas are one picture of the batch, not two, and the code does not pull the
    canvas; its threshold on the guidance is left out, because its guidance has no effect (both branches have the same
    embedding): give guidance=1, or equal prompts with the inversion "negative-prompt", for the same. Here dy counts
    downwards, its dy upwards. Put FollowSource before it. Families: all; in joint attention the keys of the latents are
    masked, and resized or flipped layers need an inversion that has a trajectory.
    """

    paper: ClassVar[str] = "arXiv 2403.14487"
    fixes: ClassVar[str] = "objects to be moved, resized, flipped or removed"

    where: Where = field(default=Where(kinds=("self", "cross", "joint")), kw_only=True)
    layers: Sequence[Layer] = ()
    trajectories: Any = field(default=None, kw_only=True, compare=False)
    refine: Any = field(default=None, kw_only=True, compare=False)
    masking: str = param("zero-key", "how the keys of the objects are masked", choices=("zero-key", "-inf"))
    mask_until: float = param(0.8, "part of the run with masked keys", 0, 1)
    fuse_at: float = param(0.82, "part of the run before the layers are pasted", 0, 1)
    pull: float = param(0.1, "how far each later step leads back to the source outside the layers", 0, 1)

    @property
    def idle(self) -> bool:
        return self.window.empty or not self.layers

    def pictures(self, source: Image.Image) -> list[Image.Image]:
        """The pictures whose trajectories it needs, one for each layer that is resized or flipped."""
        return [layer.resized(source) for layer in self.layers if layer.reshaped]

    def begin(self, sampling: Sampling) -> State:
        sources = Sources.of(sampling, self.name)
        reshaped = [layer for layer in self.layers if layer.reshaped]
        known = 0 if self.trajectories is None else len(self.trajectories)
        if known != len(reshaped):
            raise ControlError(
                f"{self.name} has {len(reshaped)} layers that are resized or flipped and {known} trajectories: give "
                "one for each, in their order, or use EditPipeline."
            )
        _, height, width = sampling.latent_grid
        size = (width * PIXELS, height * PIXELS)
        holes = [layer.hole(size) for layer in self.layers]
        more = [] if self.refine is None else [Layer(self.refine).at_start(size)]
        hidden = {}
        for grid in sampling.grids(self.where):
            late = _share(holes, grid)
            hidden[grid] = (_share([*holes, *more], grid).to(sampling.device), late.to(sampling.device))
            if self.masking == "-inf" and (hidden[grid][0] >= 0.5).all():
                raise ControlError(
                    f"{self.name}: the layers' masks cover all of {grid[1]}x{grid[2]} tokens, and no key is left to "
                    'see: give smaller masks, or masking="zero-key".'
                )
        cuts = []
        for number, layer in enumerate(self.layers):
            if layer.remove:
                continue
            mask = Region(f"layer {number}", mask=layer.resized_mask(size))
            cut = Cut(
                mask.raster(height, width, "any").bool().to(sampling.device),
                round(layer.dy * height),
                round(layer.dx * width),
                reshaped.index(layer) if layer.reshaped else None,
            )
            if not shifted(cut.inside.float(), cut.down, cut.right).any():
                raise ControlError(
                    f"{self.name}: layer {number} leaves the picture by dx {layer.dx}, dy {layer.dy}: move it less, "
                    "or remove it."
                )
            cuts.append(cut)
        hole = (_share(holes, (1, height, width)) > 0).unflatten(0, (height, width))
        return State(sources, hidden, hole.to(sampling.device), cuts)

    def inputs(self, call: Call, state: State) -> Call:
        latent, text = call.keys.latent, call.keys.text
        edits = state.sources.edits(call.key)
        if state.pasted and state.cuts and text.start != text.stop:
            key, value = call.key.clone(), call.value.clone()
            key[:, :, text] = state.sources.of_source(call.key[:, :, text])
            value[:, :, text] = state.sources.of_source(call.value[:, :, text])
            return call.change(key=torch.where(edits, key, call.key), value=torch.where(edits, value, call.value))
        if call.step.progress >= self.mask_until or latent.start == latent.stop:
            return call
        assert call.keys.grid is not None
        early, late = state.hidden[call.keys.grid]
        share = torch.zeros(call.key.shape[2], device=call.key.device, dtype=call.key.dtype)
        share[latent] = (early if call.step.progress < 0.5 else late).to(share)
        if self.masking == "zero-key":
            return call.change(key=torch.where(edits, call.key * (1 - share[:, None]), call.key))
        seen = ~edits | (share < 0.5)
        return call.change(mask=combine_masks([m for m in (call.mask, seen) if m is not None]))

    def latents(self, latents: torch.Tensor, step: Step, state: State) -> torch.Tensor:
        source, edits = state.sources.of_source(latents), state.sources.edits(latents)
        hole = _as(state.hole, latents)
        if state.pasted:
            free = _as(state.free, latents)
            drawn = torch.where(free, latents, latents + self.pull * (source - latents))
            return torch.where(edits, drawn, latents)
        drawn = torch.where(hole, latents, source)
        if step.progress >= self.fuse_at or step.index == step.total - 1:
            state.pasted, state.free = True, state.hole
            for cut in state.cuts:
                layer = source
                if cut.trajectory is not None:
                    own = on_trajectory(self.trajectories[cut.trajectory], step, latents, state.sources, self.name)
                    layer = own.repeat(state.sources.prompts, *[1] * (own.ndim - 1))
                fine = [f // c for f, c in zip(latents.shape[-2:], cut.inside.shape, strict=True)]
                inside = _as(cut.inside, latents)
                drawn = pasted(drawn, layer, inside, cut.down * fine[0], cut.right * fine[1])
                state.free = state.free | (shifted(cut.inside.float(), cut.down, cut.right) > 0)
        return torch.where(edits, drawn, latents)


def _share(masks: Sequence[Image.Image], grid: Grid) -> torch.Tensor:
    """How much of each token of a grid lies in any of the masks, (tokens,) in 0..1."""
    shares = [Region("a layer", mask=mask).raster(grid[1], grid[2]).flatten() for mask in masks]
    return torch.stack(shares).amax(dim=0)


def _as(cells: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Cells of the token grid for latents, which may be finer (2x2 for each token where a model packs them)."""
    height, width = latents.shape[-2:]
    return cells.repeat_interleave(height // cells.shape[0], 0).repeat_interleave(width // cells.shape[1], 1)
