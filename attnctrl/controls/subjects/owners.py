"""Whose each latent is: by the subjects' regions, or by the attention of the step before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F

from attnctrl.control import Where, Window
from attnctrl.errors import ControlError
from attnctrl.kernels import probabilities
from attnctrl.references import cells
from attnctrl.regions import Region
from attnctrl.sampling import Sampling
from attnctrl.sites import Call, Grid, Site, Step
from attnctrl.stepmaps import SelfMap, blur

WATCHED = Where(kinds=("cross", "self"), max_tokens=1024)
"""The layers whose attention is read: grids up to 32 x 32, as in MagicFace and ConsiStory."""


def powered(apply: Sequence[SelfMap], maps: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """The sum of weights[n] S^(n+1) C, averaged over layers S; C itself without weights.

    apply: self-attention S of layers of one grid. maps: C, (batch, latent tokens, text tokens).
    """
    if not weights or not apply:
        return maps
    total = torch.zeros_like(maps)
    for layer in apply:
        spread = maps
        for weight in weights:
            spread = layer.apply(spread)
            total = total + weight * spread
    return total / len(apply)


def otsu(values: torch.Tensor) -> torch.Tensor:
    """The threshold that parts each row best in two (Otsu, 1979): the largest value of the lower class.

    values: (..., n) -> (..., 1); of a constant row that value.
    """
    ordered = values.sort(dim=-1).values
    count = ordered.shape[-1]
    below = torch.arange(1, count, device=values.device, dtype=values.dtype)
    sums = ordered.cumsum(dim=-1)
    low, high = sums[..., :-1] / below, (sums[..., -1:] - sums[..., :-1]) / (count - below)
    between = below * (count - below) * (high - low) ** 2
    return ordered.gather(-1, between.argmax(dim=-1, keepdim=True))


def owned_by_argmax(maps: torch.Tensor, words: torch.Tensor, others: float) -> torch.Tensor:
    """Whose word is attended to most, the other tokens' maps multiplied by `others` (MagicFace).

    maps: (batch, text tokens, latent tokens), each of mean 1. words: bool (batch, subjects, text tokens). Where
    `others` is below 0.9 latents are left out at which the start token, which stands for the background, is attended to
    more than the rest together. -> bool (batch, subjects, latent tokens), at most one.
    """
    known = words.any(dim=1)[..., None]
    winner = torch.where(known, maps, others * maps).argmax(dim=1)
    owned = words.gather(2, winner[:, None].expand(-1, words.shape[1], -1))
    if others < 0.9:
        rest = maps[:, 1:].mean(dim=1)
        owned &= (rest >= maps[:, 0])[:, None]
    return owned


def owned_by_otsu(maps: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Latents above Otsu's threshold of each subject's map; of several the one with the larger share of its maximum.

    maps, words and result as for `owned_by_argmax`.
    """
    each = torch.stack([maps.masked_fill(~w[..., None], float("-inf")).amax(dim=1) for w in words.unbind(1)], dim=1)
    low, high = each.amin(dim=-1, keepdim=True), each.amax(dim=-1, keepdim=True)
    each = (each - low) / (high - low).clamp(min=1e-12)
    above = each > otsu(each)
    best = torch.where(above, each, -1.0).argmax(dim=1, keepdim=True)
    return above & (torch.arange(each.shape[1], device=maps.device)[None, :, None] == best)


class Owner(Protocol):
    """What has a phrase and, maybe, a region: a `Subject`, or `Named`."""

    @property
    def phrase(self) -> str: ...

    @property
    def placed(self) -> Region | None: ...


@dataclass(frozen=True)
class Named:
    """A phrase without pictures."""

    phrase: str
    placed: Region | None = None


def given_owners(subjects: Sequence[Owner], grid: Grid) -> torch.Tensor:
    """Whose each latent token is by the regions: bool (subjects, height * width), at most one; the later lies on top.

    Without a region a subject owns nothing.
    """
    owners = torch.zeros(len(subjects), grid[1] * grid[2], dtype=torch.bool)
    for i, subject in enumerate(subjects):
        if subject.placed is not None:
            inside = cells(subject.placed, *grid[1:])
            owners[:i] &= ~inside
            owners[i] = inside
    return owners


@dataclass
class Owners:
    """Which latents belong to which subject, for the pictures of a run.

    words: bool (pictures, subjects, text tokens), the last token of each phrase. powers, others: see above; without
    `others` Otsu's threshold decides. The attention is that of the conditional branch in the step before; in the first
    step nobody owns anything but by regions.
    """

    subjects: Sequence[Owner]
    pictures: slice
    words: torch.Tensor
    device: torch.device
    powers: tuple[float, ...] = ()
    others: float | None = None
    cross: dict[str, tuple[Grid, torch.Tensor]] = field(default_factory=dict)
    self_: dict[str, SelfMap] = field(default_factory=dict)
    step: int = -1
    found: tuple[Grid, torch.Tensor] | None = None

    @classmethod
    def begin(
        cls,
        sampling: Sampling,
        subjects: Sequence[Owner],
        scenes: int,
        who: str,
        *,
        powers: tuple[float, ...] = (),
        others: float | None = None,
    ) -> Owners:
        """scenes: how many prompts are pictures. Raises ControlError for phrases that are not in their prompts, and
        where attention cannot tell whose a latent is."""
        images = sampling.images_per_prompt
        words = torch.zeros(scenes, len(subjects), sampling.text_tokens, dtype=torch.bool)
        watches = any(subject.placed is None for subject in subjects)
        if watches and not any(site.kind == "cross" for site in sampling.sites):
            named = next(subject.phrase for subject in subjects if subject.placed is None)
            raise ControlError(
                f'{who} needs to know where "{named}" belongs, which it reads in cross-attention alone: give its '
                "Subject a region."
            )
        for p in range(scenes if watches else 0):
            for i, subject in enumerate(subjects):
                words[p, i, sampling.find(subject.phrase, p)[-1]] = True
        for subject in subjects:
            if subject.placed is not None:
                subject.placed.check_aspect(*sampling.latent_grid[1:])
        words = words.repeat_interleave(images, dim=0).to(sampling.device)
        return cls(subjects, slice(0, scenes * images), words, sampling.device, powers, others)

    @property
    def watches(self) -> bool:
        """Whether attention is read: there is a subject without a region."""
        return any(subject.placed is None for subject in self.subjects)

    def watch(self, call: Call) -> None:
        """Keep what the latents of the pictures attend to in one call; a repeat is harmless."""
        if not self.watches or call.branch != "cond" or call.queries.grid is None or call.site.kind == "joint":
            return
        grid = call.queries.grid
        if grid[0] * grid[1] * grid[2] > (WATCHED.max_tokens or 0):
            return
        if call.step.index != self.step:
            self._settle()
            self.step = call.step.index
        query, key = call.query[self.pictures], call.key[self.pictures]
        if call.site.kind == "self":
            if self.powers:
                self.self_[call.site.name] = SelfMap(call.site, grid, query, key, None, call.scale)
            return
        mask = call.mask if call.mask is None or len(call.mask) == 1 else call.mask[self.pictures]
        self.cross[call.site.name] = grid, probabilities(query, key, mask, call.scale).mean(dim=1)

    def maps(self) -> tuple[Grid, torch.Tensor] | None:
        """The maps of all text tokens, (pictures, text tokens, latent tokens) of mean 1, on the finest grid."""
        if not self.cross:
            return None
        grids = sorted({grid for grid, _ in self.cross.values()}, key=lambda g: -g[1] * g[2])
        finest = grids[0]
        total = torch.zeros((), device=self.device)
        for grid in grids:
            here = torch.stack([m for g, m in self.cross.values() if g == grid]).mean(dim=0)
            layers = [layer for layer in self.self_.values() if layer.grid == grid]
            flat = powered(layers, here, self.powers).transpose(1, 2)
            sized = F.interpolate(
                flat.unflatten(2, grid[1:]), size=finest[1:], mode="bilinear", align_corners=False
            ).flatten(2)
            sized = blur(sized, finest)
            total = total + sized / sized.mean(dim=-1, keepdim=True).clamp(min=1e-12)
        return finest, total / len(grids)

    def _settle(self) -> None:
        made = self.maps()
        self.cross.clear()
        self.self_.clear()
        if made is None:
            return
        grid, maps = made
        rule = owned_by_otsu(maps, self.words) if self.others is None else None
        self.found = grid, owned_by_argmax(maps, self.words, self.others or 0.0) if rule is None else rule

    def at(self, grid: Grid) -> torch.Tensor:
        """Bool (pictures, subjects, latent tokens) on a grid, at most one subject at each; regions come first."""
        given = given_owners(self.subjects, grid).to(self.device)[None]
        owned = given.expand(len(self.words), -1, -1)
        if self.found is None:
            return owned
        known, found = self.found
        if known != grid:
            pictures = found.float().unflatten(2, known[1:])
            found = F.interpolate(pictures, size=grid[1:], mode="nearest-exact").flatten(2) > 0
        free = torch.tensor([s.placed is None for s in self.subjects], device=self.device)[None, :, None]
        return owned | (found & free & ~given.any(dim=1, keepdim=True))


def in_or_before(window: Window, step: Step) -> bool:
    """Whether a control acts in this step or in the next, for which it reads this one's attention."""
    return step.progress in window or (step.index + 1) / step.total in window


def watched_sites(sampling: Sampling, subjects: Sequence[Owner], chosen: list[Site]) -> list[Site]:
    """The sites of a control, with those whose attention must be read where a subject has no region."""
    if all(subject.placed is not None for subject in subjects):
        return chosen
    names = {site.name for site in (*chosen, *WATCHED.select(sampling.sites, sampling.latent_grid))}
    return [site for site in sampling.sites if site.name in names]


def late_sites(sampling: Sampling, where: Where, share: float) -> list[Site]:
    """The sites that `where` selects, in the order of the forward pass, without the first `share` of them."""
    sites = where.select(sampling.sites, sampling.latent_grid)
    return sites[round(share * len(sites)) :]
