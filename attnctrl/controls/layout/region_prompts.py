"""Attention couple: every region has a prompt of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from attnctrl.control import Control, Where, Window, param
from attnctrl.controls.layout.couple import JointCouple, longest, written
from attnctrl.controls.layout.entities import Entities, with_entities
from attnctrl.errors import ControlError
from attnctrl.kernels import TokenGroups
from attnctrl.layout import Layout, Regions, resolve
from attnctrl.sampling import Sampling
from attnctrl.sites import Call, Grid, Step, Stream
from attnctrl.text import Text


def couple_weights(masks: torch.Tensor, weights: torch.Tensor, base_ratio: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The share of each region's attention and of the base prompt's at each pixel; together they are 1.

    masks: (batch, regions, tokens) in [0, 1]; weights: (batch, regions) >= 0. Where the weighted masks sum to more
    than 1 they are normalised (overlaps share); what they leave uncovered belongs to the base prompt.
    -> regions (batch, regions, tokens), base (batch, tokens).
    """
    weighted = masks * weights[..., None]
    total = weighted.sum(dim=1, keepdim=True)
    share = weighted / total.clamp(min=1e-8)
    covered = masks.amax(dim=1, keepdim=True) * (total > 0)
    regions = share * covered * (1 - base_ratio)
    return regions, 1 - regions.sum(dim=1)


def feathered(masks: torch.Tensor, grid: Grid, feather: float) -> torch.Tensor:
    """Gaussian-softened masks. feather: standard deviation as a fraction of the shorter side; 0 changes nothing."""
    _, height, width = grid
    sigma = feather * min(height, width)
    if sigma <= 0:
        return masks

    def line(count: int) -> torch.Tensor:
        at = torch.arange(count, device=masks.device, dtype=masks.dtype)
        kernel = torch.exp(-((at[:, None] - at[None, :]) ** 2) / (2 * sigma**2))
        return kernel / kernel.sum(dim=1, keepdim=True)

    pictures = masks.unflatten(-1, (-1, height, width))
    return (line(height) @ pictures @ line(width).T).flatten(-3)


def confinement(tokens: torch.Tensor, masks: torch.Tensor) -> torch.Tensor | None:
    """Visibility of the main prompt's words: those of the regions are hidden from pixels that no region touches.

    tokens: (batch, regions, text tokens) bool; masks: (batch, regions, latent tokens).
    -> (batch, 1, latent tokens, text tokens) bool, None where nothing is hidden.
    """
    uncovered = (masks == 0).all(dim=1)
    hidden = uncovered[:, :, None] & tokens.any(dim=1)[:, None, :]
    return ~hidden[:, None] if bool(hidden.any()) else None


def named_tokens(sampling: Sampling, layout: Layout) -> torch.Tensor | None:
    """(batch, regions, text tokens) bool: where the regions' phrases stand in the main prompts, if they do."""
    rows = torch.zeros(len(layout.regions), layout.valid.shape[1], sampling.text_tokens, dtype=torch.bool)
    for p, regions in enumerate(layout.regions if sampling.prompts is not None else ()):
        for r, region in enumerate(regions):
            if sampling.tokens[p][0].occurrences(region.phrase):
                rows[p, r, list(sampling.find(region.phrase, p, region.occurrence))] = True
    return rows.to(sampling.device).repeat_interleave(layout.images, dim=0) if rows.any() else None


@dataclass(frozen=True)
class RegionPrompts(Control):
    """Each region attends to its own prompt; the outputs are merged by the masks (attention couple).

    output(p) = base(p) * Attn(q, prompt) + sum_r share_r(p) * Attn(q, prompt_r), as in the attention-couple family
    (regional prompter's attention mode). The text of a region is `Region.prompt`, else its phrase, which need not
    stand in the main prompt. Pixels of no region follow the main prompt alone instead of being an error, and
    overlaps share by `Region.weight`. The main prompt takes part in the regions by `base_ratio`, 0.2 there.
    `confine`, which those tools lack because their regions tile the picture: where phrases of the regions also stand
    in the main prompt, pixels outside every region do not see them there; else they draw a second copy.
    Those tools act in every step; on the shapes world that costs objects, hence the default window.
    In joint attention the texts of the regions stand beside the prompt in the sequence, each as long as its encoder
    makes it, and the sum is the same: Attn(q, prompt) is the stock attention of prompt and latents, Attn(q, prompt_r)
    one over all latents and the text of r. That text sees itself and the latents that have a share in it, and changes
    from layer to layer; the prompt sees no text of a region. Each round of regions that do not overlap costs one more
    attention, by token groups. Outside the window, and for the unconditional prediction, these texts are out of sight.
    Families: all but those whose text must keep its length (HunyuanVideo, Mochi, Z-Image), which say so.
    """

    paper: ClassVar[str] = "attention couple; regional prompter"
    fixes: ClassVar[str] = "different descriptions for different parts of the picture"

    regions: Regions = ()
    base_ratio: float = param(0.2, "share of the main prompt inside the regions; 1 is the stock picture", 0, 1)
    feather: float = param(0.0, "softness of the region borders, as a fraction of the shorter side", 0, 0.5)
    confine: bool = param(True, "hide the regions' words of the main prompt from pixels outside every region")
    window: Window = field(default=Window(0.0, 0.3), kw_only=True)
    where: Where = field(default=Where(), kw_only=True)

    @property
    def idle(self) -> bool:
        return self.window.empty or self.base_ratio == 1 or not any(self.regions)

    def context(self, text: Text, sampling: Sampling) -> Text:
        if not self._in_sequence(sampling):
            return text
        return with_entities(text, sampling, self.regions, longest(sampling, self.regions))

    def _in_sequence(self, sampling: Sampling) -> bool:
        return sampling.joint and "joint" in self.where.kinds

    def acts(self, step: Step, branch: str, state: Any) -> bool:
        if isinstance(state, JointCouple):
            # Everywhere that the texts of the regions must be hidden.
            return branch != "uncond" or state.entities.beside_negative
        return super().acts(step, branch, state)

    def begin(self, sampling: Sampling) -> Any:
        if self._in_sequence(sampling):
            return self._begin_joint(sampling)
        layout = resolve(sampling, self.regions, self.where, how="coverage", find=False)
        most = layout.valid.shape[1]
        # Prompts with fewer regions repeat their first text, at weight 0.
        texts = [
            [(rs[r] if r < len(rs) else rs[0]).text for r in range(most)] if rs else [""] * most
            for rs in layout.regions
        ]
        encoded = sampling.encode([text for row in texts for text in row]).positive
        contexts = encoded.unflatten(0, (len(texts), most)).repeat_interleave(layout.images, dim=0)
        masks, shares = self._shares(sampling, layout)
        tokens = named_tokens(sampling, layout) if self.confine else None
        visible = {grid: None if tokens is None else confinement(tokens, masks[grid]) for grid in masks}
        return {"contexts": contexts.to(sampling.dtype), "shares": shares, "visible": visible, "keys": {}}

    def _begin_joint(self, sampling: Sampling) -> JointCouple:
        if "uncond" in self.branches:
            raise ControlError(
                f"{self.name} puts the regions' texts beside the prompt of a model with joint attention, not beside "
                'its negative prompt: use branches=("cond",).'
            )
        entities = Entities.begin(sampling, self.regions, self.where)
        masks, shares = self._shares(sampling, entities.layout)
        tokens = named_tokens(sampling, entities.layout) if self.confine else None
        return JointCouple(
            entities,
            written(sampling, self.regions, longest(sampling, self.regions)),
            shares,
            {grid: (one == 0).all(dim=1) for grid, one in masks.items()},
            None if tokens is None else tokens.any(dim=1),
        )

    def _shares(self, sampling: Sampling, layout: Layout) -> tuple[dict[Grid, torch.Tensor], dict[Grid, Any]]:
        """By grid: the masks, and the shares of `couple_weights`."""
        weights = torch.zeros(layout.valid.shape, device=sampling.device)
        for row, p in enumerate(i for i in range(len(layout.regions)) for _ in range(layout.images)):
            for r, region in enumerate(layout.regions[p]):
                weights[row, r] = region.weight
        grids = sampling.grids(self.where)
        masks = {grid: feathered(layout.mask(grid, "coverage"), grid, self.feather) for grid in grids}
        return masks, {grid: couple_weights(masks[grid], weights, self.base_ratio) for grid in grids}

    def mask(self, call: Call, state: Any) -> torch.Tensor | TokenGroups | None:
        if isinstance(state, JointCouple):
            return state.mask(call, super().acts(call.step, call.branch, state))
        return state["visible"][call.queries.grid]

    def inputs(self, call: Call, state: Any) -> Call:
        if isinstance(state, JointCouple):
            return state.inputs(call) if super().acts(call.step, call.branch, state) else call
        if call.project is None:
            raise ControlError(
                f"{self.name} needs layers that take text as keys, which {call.site.name} does not: use "
                'Where(kinds=("cross", "joint")).'
            )
        contexts, keys = state["contexts"], state["keys"]
        if call.site.name not in keys:
            # Text does not change during a run: project it once per layer.
            # Outside a caller's inference mode, because a later step's loss may save it for its backward pass.
            with torch.inference_mode(False), torch.no_grad():
                keys[call.site.name] = [call.project(contexts[:, r]) for r in range(contexts.shape[1])]
        regions, base = state["shares"][call.queries.grid]
        dtype = call.query.dtype
        streams = tuple(
            Stream(key, value, regions[:, r, :, None][:, None].to(dtype))
            for r, (key, value) in enumerate(keys[call.site.name])
        )
        return call.shared(base[:, None, :, None].to(dtype), *streams)
