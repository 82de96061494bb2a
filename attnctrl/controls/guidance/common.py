"""What the guidance methods share."""

from __future__ import annotations

from collections.abc import Sequence

from attnctrl.control import Control, Where
from attnctrl.errors import ControlError
from attnctrl.sampling import Sampling
from attnctrl.sites import Site

OWN = ("self", "joint")
"""The kinds of attention in which latents see latents."""


def middle(sites: Sequence[Site]) -> list[Site]:
    """Of each denoiser the layers of the middle block, or where there is none, the layer in the middle."""
    found: list[Site] = []
    for expert in sorted({site.expert for site in sites}):
        own = sorted((s for s in sites if s.expert == expert), key=lambda s: s.order)
        found += [s for s in own if s.block == "mid"] or [own[len(own) // 2]]
    return found


def selected(control: Control, sampling: Sampling, where: Where) -> list[Site]:
    """The sites that `where` keeps, at least one. Raises ControlError otherwise."""
    sites = where.select(sampling.sites, sampling.latent_grid)
    if not sites:
        kinds = ", ".join(sorted({s.kind for s in sampling.sites}))
        raise ControlError(f"{control.name}: {where} selects no attention layer of this model, which has {kinds}.")
    return sites
