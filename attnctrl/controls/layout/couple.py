"""Attention couple in one joint sequence: latents attend to the prompt and, apart, to the text of each region."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from attnctrl.controls.layout.entities import Entities, Places
from attnctrl.kernels.groups import TokenGroups
from attnctrl.layout import Regions, per_prompt
from attnctrl.sampling import Sampling
from attnctrl.sites import Call, Grid, Stream


def rounds(touched: torch.Tensor) -> list[list[int]]:
    """Regions in as few rounds as the order allows, such that no latent belongs to two regions of one round.

    touched: (batch, regions, latent tokens) bool.
    """
    found: list[list[int]] = []
    for r in range(touched.shape[1]):
        free = (one for one in found if not (touched[:, one].any(dim=1) & touched[:, r]).any())
        fit = next(free, None)
        if fit is None:
            found.append([r])
        else:
            fit.append(r)
    return found


def base_groups(places: Places, named: torch.Tensor | None = None, lone: torch.Tensor | None = None) -> TokenGroups:
    """The stock attention of prompt and latents, the texts of the regions out of sight.

    named: (batch, tokens) bool, words of the prompt that the latents `lone`, bool likewise, do not see.
    """
    seen = places.latents | places.prompt
    if named is None or lone is None:
        return TokenGroups.from_members(seen[..., None])
    queries, keys = (seen, seen & ~lone), (seen & ~named, seen & named)
    return TokenGroups.from_members(torch.stack(queries, dim=-1), torch.stack(keys, dim=-1))


def region_groups(places: Places, own: torch.Tensor, inside: torch.Tensor) -> TokenGroups:
    """Latents of some regions see all latents and the text of their region, which sees itself and these latents.

    own: (batch, regions, tokens) bool, the tokens of each text; inside: likewise, the latents of each region.
    """
    both = [*(own | inside).unbind(1)]
    queries, keys = [inside.any(dim=1), *both], [places.latents, *both]
    return TokenGroups.from_members(torch.stack(queries, dim=-1), torch.stack(keys, dim=-1))


def written(sampling: Sampling, regions: Regions, kept: int) -> torch.Tensor:
    """(batch, regions, kept) bool: tokens of the regions' texts, without what only fills them up to one length.

    An encoder that pads its texts to a fixed length, as T5, has no such filling: its padding is seen in the stock
    model too.
    """
    lists = per_prompt(regions, sampling.prompt_count)
    rows = torch.zeros(len(lists), max(map(len, lists)), kept, dtype=torch.bool, device=sampling.device)
    for row, rs in zip(rows, lists, strict=True):
        if rs:
            filled = (sampling.encode([r.text for r in rs]).positive != 0).any(dim=-1)
            # Where all texts are 0, an encoder is left out, and the stock model sees that: the longest is never filled.
            row[: len(rs), : filled.shape[1]] = filled | ~filled.any(dim=0)
    return rows.repeat_interleave(sampling.images_per_prompt, dim=0)


def longest(sampling: Sampling, regions: Regions) -> int:
    """The text tokens of the longest encoding of a prompt's regions."""
    lists = per_prompt(regions, sampling.prompt_count)
    return max(sampling.encode([r.text for r in rs]).positive.shape[1] for rs in lists if rs)


@dataclass
class JointCouple:
    """What `RegionPrompts` knows in one sampling of a model with joint attention.

    written: (batch, regions, tokens of a block) bool. shares: by grid, the regions' (batch, regions, latent tokens) and
    the prompt's (batch, latent tokens). named: (batch, prompt tokens) bool, words hidden from latents of no region.
    """

    entities: Entities
    written: torch.Tensor
    shares: dict[Grid, tuple[torch.Tensor, torch.Tensor]]
    lone: dict[Grid, torch.Tensor]
    named: torch.Tensor | None
    made: dict[Any, Any] = field(default_factory=dict)

    def mask(self, call: Call, shown: bool) -> TokenGroups:
        """What the layer's own softmax sees; shown: whether the regions have theirs in this call."""
        return self._made(call, self._base if shown else base_groups_of)

    def inputs(self, call: Call) -> Call:
        """The call with a stream for each round of regions."""
        base, rounds = self._made(call, self._streams)
        dtype = call.query.dtype
        base = base.to(dtype)
        return call.shared(base, *(Stream(call.key, call.value, weight.to(dtype), groups) for weight, groups in rounds))

    def _made(self, call: Call, make: Any) -> Any:
        """Once for all layers that agree on the places of their tokens."""
        text, latent = call.queries.text, call.queries.latent
        key = (make, text.start, text.stop, latent.start, latent.stop, call.query.shape[2])
        if key not in self.made:
            self.made[key] = make(self.entities.places(call), call)
        return self.made[key]

    def _base(self, places: Places, call: Call) -> TokenGroups:
        if self.named is None:
            return base_groups(places)
        named, lone = torch.zeros_like(places.prompt), torch.zeros_like(places.prompt)
        first = call.queries.text.start
        named[:, first : first + self.named.shape[1]] = self.named
        lone[:, call.queries.latent] = self.lone[self._grid(call)]
        return base_groups(places, named, lone)

    def _streams(self, places: Places, call: Call) -> tuple[torch.Tensor, list[tuple[torch.Tensor, TokenGroups]]]:
        """The weight of the layer's own softmax, (batch, 1, tokens, 1), and of each round with what it sees."""
        regions, base = self.shares[self._grid(call)]
        own = torch.zeros_like(places.entities)
        own[places.entities] = self.written[places.entities.any(dim=-1)].flatten()
        shares = torch.zeros(own.shape, device=own.device)
        shares[:, :, call.queries.latent] = regions
        weight = (places.latents | places.prompt).float()
        weight[:, call.queries.latent] = base
        found = []
        for some in rounds(shares > 0):
            of_round = shares[:, some].sum(dim=1) + places.entities[:, some].any(dim=1)
            groups = region_groups(places, own[:, some], shares[:, some] > 0)
            found.append((of_round[:, None, :, None], groups))
        return weight[:, None, :, None], found

    @staticmethod
    def _grid(call: Call) -> Grid:
        assert call.queries.grid is not None
        return call.queries.grid


def base_groups_of(places: Places, call: Call) -> TokenGroups:
    return base_groups(places)
