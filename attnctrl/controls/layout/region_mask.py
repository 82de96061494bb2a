"""Masking of text by regions: the words of a region are seen only inside it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from attnctrl.control import Control, Where, Window, param
from attnctrl.kernels import LowRankBias, TokenGroups
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
    bias = torch.zeros(inside.shape, device=masks.device)
    return bias.masked_fill(bound & inside, boost).masked_fill(bound & ~inside, _outside(weight))


def word_classes(tokens: torch.Tensor, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The words that belong to the same regions as one class, so that whether a latent is inside is said per class.

    tokens: (batch, regions, text tokens) bool; masks: (batch, regions, latent tokens), inside at 0.5 or more.
    -> words (batch, classes, text tokens) bool, of which each token has one at most; inside (batch, classes, latent
    tokens) bool.
    """
    regions = tokens.transpose(1, 2)
    found = regions.flatten(0, 1).unique(dim=0)
    found = found[found.any(dim=1)]
    words = (regions[:, None] == found[:, None]).all(dim=-1)
    inside = (found[None, :, :, None] & (masks >= 0.5)[:, None]).any(dim=2)
    return words, inside


def joint_mask(words: torch.Tensor, inside: torch.Tensor, call: Call, weight: float, boost: float) -> Any:
    """`region_bias` for text and latents in one sequence, both ways, as `TokenGroups` or a `LowRankBias`.

    words: (batch, classes, prompt tokens) bool; inside: (batch, classes, latent tokens) bool. Latents get the bias
    for words; words get log(1 - weight) for the latents outside their regions, and no boost. All else is as it was.
    """
    total, text, latent = call.query.shape[2], call.queries.text, call.queries.latent
    batch, classes, count = words.shape
    word = torch.zeros(batch, classes, total, dtype=torch.bool, device=words.device)
    word[:, :, text.start : text.start + count] = words
    within = torch.zeros_like(word)
    within[:, :, latent] = inside
    latents = torch.zeros(batch, 1, total, dtype=torch.bool, device=words.device)
    latents[:, :, latent] = True
    beyond = latents & ~within
    if weight == 1:
        bound = word.any(dim=1, keepdim=True)
        # Whoever is no word of a region sees whoever is none; whoever is no latent, whoever is none; and each class
        # its inside.
        members = torch.cat([~bound, ~latents, word | within], dim=1)
        groups = TokenGroups.from_members(members.transpose(1, 2))
        sides, keys = boost * within.float(), word.float()
        return groups if boost == 0 else LowRankBias(sides.transpose(1, 2), keys.transpose(1, 2), groups)
    outside = _outside(weight)
    queries = torch.cat([boost * within + outside * beyond, outside * word], dim=1)
    keys = torch.cat([word, beyond], dim=1).float()
    return LowRankBias(queries.transpose(1, 2), keys.transpose(1, 2))


def _outside(weight: float) -> float:
    return math.log1p(-weight) if weight < 1 else float("-inf")


JOINT_SHARE = 1 / 3
"""Of the boost, in joint attention."""


@dataclass(frozen=True)
class RegionMask(Control):
    """Hide the words of each region from the pixels outside it, in every layer that attends to text.

    The masked form of regional attention, as in rectified cross-attention (I Dream My Painting, arXiv 2411.10162) and
    Omost's score masks. Special tokens and words of no region stay visible everywhere: they carry the summary of the
    sentence and the background. Pixels of no region see those only. Overlaps see the words of all their regions.
    In joint attention the words change from layer to layer by what they see, so they do not see the pixels outside
    their regions either: by token groups at weight 1, else by log(1 - weight) both ways, an additive mask of low
    rank. `boost` is for what pixels see, and a third of it is taken there, where the words compete with the other
    pixels too: on the shapes world all of it draws .56 of the objects, a third .90. No array is tokens x tokens.
    Families: all. Works under torch.compile on the UNets.
    """

    paper: ClassVar[str] = "arXiv 2411.10162"
    fixes: ClassVar[str] = "objects in the wrong place, attributes leaking between objects"

    regions: Regions = ()
    weight: float = param(1.0, "how much of the attention from outside is removed: logit bias log(1 - weight)", 0, 1)
    boost: float = param(6.0, "logit bias inside the region; in joint attention a third of it", 0, 20)
    window: Window = field(default=Window(0.0, 0.8), kw_only=True)
    where: Where = field(default=Where(), kw_only=True)

    @property
    def idle(self) -> bool:
        return self.window.empty or not any(self.regions) or (self.weight == 0 and self.boost == 0)

    def begin(self, sampling: Sampling) -> Any:
        layout = resolve(sampling, self.regions, self.where)
        if sampling.joint:
            return {grid: word_classes(layout.tokens, layout.mask(grid)) for grid in sampling.grids(self.where)}, {}
        return {grid: self._bias(layout, grid, sampling.dtype) for grid in sampling.grids(self.where)}, {}

    def _bias(self, layout: Layout, grid: Any, dtype: torch.dtype) -> torch.Tensor:
        bias = region_bias(layout.tokens, layout.mask(grid), self.weight, self.boost)[:, None]
        # A boolean mask where nothing but visibility is asked: kernels can skip what it forbids.
        return bias == 0 if self.weight == 1 and self.boost == 0 else bias.to(dtype)

    def mask(self, call: Call, state: Any) -> torch.Tensor | TokenGroups | LowRankBias:
        by_grid, made = state
        if call.site.kind != "joint":
            return by_grid[call.queries.grid]
        # One for all layers that agree on the places of their tokens.
        key = (call.queries.text.start, call.queries.latent.start, call.query.shape[2])
        if key not in made:
            words, inside = by_grid[call.queries.grid]
            made[key] = joint_mask(words, inside, call, self.weight, self.boost * JOINT_SHARE)
        return made[key]
