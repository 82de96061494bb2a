"""Personalized Residuals: a LoRA acts only where its concept is."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from attnctrl.control import Control, Where, param
from attnctrl.controls.reading import text_shares
from attnctrl.controls.subjects.owners import otsu
from attnctrl.errors import ControlError
from attnctrl.references import cells
from attnctrl.regions import Region
from attnctrl.sampling import Sampling
from attnctrl.sites import Call, Site, Step

THRESHOLDS = ("median", "otsu")


def above(maps: torch.Tensor, threshold: str) -> torch.Tensor:
    """Where a map is above its median or Otsu's threshold: (batch, tokens) -> bool; nowhere in a constant map.

    By the median it is one half of an even number of different values.
    """
    limit = otsu(maps) if threshold == "otsu" else maps.median(dim=-1, keepdim=True).values
    return maps > limit


@dataclass
class State:
    """words: bool (pictures, text tokens), the concept's. gates: the last of each grid, (pictures, height, width)."""

    words: torch.Tensor
    latents: tuple[int, int, int]
    gates: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class LocalizedResidual(Control):
    """Localized attention-guided sampling of Personalized Residuals (Ham et al., arXiv 2405.12978).

    What a LoRA of the model adds, f = W x + M B A x, counts by M: 1 where the attention to the concept's words is above
    its median, `outside` elsewhere. M is read in the cross-attention of the same block and step where that comes before
    the LoRA's layer, else in the last one of its grid; before the first one of a run the LoRA acts in full. With a
    region M is the region. Both branches have the M of the conditional one, which the paper leaves open. A LoRA of
    the output projections of transformer blocks, the paper's, has a place in all that it does; parts of others that act
    on text or time have none, and count by `outside`. Pictures whose prompt does not have the phrase get `outside`
    everywhere. With names of `adapters` these alone are confined, so that several LoRAs have a control and a place
    each. The median always takes half of the picture: for small things use Otsu's threshold. Loading and scaling are
    diffusers' own: `pipe.load_lora_weights(...)`.
    Families: UNets.
    """

    paper: ClassVar[str] = "arXiv 2405.12978"
    fixes: ClassVar[str] = "a LoRA that changes the whole picture, or two LoRAs that blend"
    needs_rows: ClassVar[bool] = False

    where: Where = field(default=Where(kinds=("cross",)), kw_only=True)
    branches: tuple[str, ...] = field(default=("cond", "uncond"), kw_only=True)
    phrase: str = ""
    region: Any = None
    adapters: tuple[str, ...] = field(default=(), kw_only=True)
    threshold: str = param("median", "what is above it is the concept's", choices=THRESHOLDS)
    outside: float = param(0.0, "share of the LoRA that is left elsewhere; 1 is the LoRA as it is", 0, 1)

    @property
    def idle(self) -> bool:
        return self.window.empty or not self.phrase or self.outside == 1

    def begin(self, sampling: Sampling) -> State:
        sites = [s for s in sampling.adapters if not self.adapters or s.name.rpartition("/")[2] in self.adapters]
        if not any(site.kind == "adapter" for site in sites):
            known = ", ".join(sorted({s.name.rpartition("/")[2] for s in sampling.adapters})) or "none"
            raise ControlError(
                f"{self.name} finds no LoRA that acts on latents (active adapters: {known}): load one into a UNet with "
                "pipe.load_lora_weights(...), leave it unfused and switched on; DoRA has no such part."
            )
        named = [p for p in range(sampling.prompt_count) if p == 0 or self._named(sampling, p)]
        words = torch.zeros(sampling.prompt_count, sampling.text_tokens, dtype=torch.bool)
        for p in named:
            words[p, list(sampling.find(self.phrase, p))] = True
        state = State(
            words.to(sampling.device).repeat_interleave(sampling.images_per_prompt, dim=0), sampling.latent_grid
        )
        if isinstance(self.region, Region):
            self.region.check_aspect(*sampling.latent_grid[1:])
        assert sampling.edit_features is not None
        for site in sites:
            sampling.edit_features(site, partial(self._confined, site, state))
        return state

    def _named(self, sampling: Sampling, prompt: int) -> bool:
        return any(tokens.occurrences(self.phrase) for tokens in sampling.tokens[prompt])

    def inputs(self, call: Call, state: State) -> Call:
        if call.branch == "cond" and call.queries.grid is not None:
            _, height, width = call.queries.grid
            maps = (text_shares(call) * state.words[:, None]).sum(dim=-1)
            state.gates[height, width] = above(maps, self.threshold).unflatten(-1, (height, width))
        return call

    def _confined(self, site: Site, state: State, features: torch.Tensor, step: Step) -> torch.Tensor:
        if site.kind != "adapter":
            return self.outside * features
        _, height, width = site.grid(state.latents)
        if features.ndim == 4:
            height, width = features.shape[2:]
        gate = self._gate(state, height, width)
        if gate is None:
            return features
        share = torch.where(gate, 1.0, self.outside).to(features)
        return features * (share[:, None] if features.ndim == 4 else share.flatten(1)[..., None])

    def _gate(self, state: State, height: int, width: int) -> torch.Tensor | None:
        """Where the concept is: bool (pictures, height, width); None while nothing is known."""
        anybody = state.words.any(dim=1)[:, None, None]
        if self.region is not None:
            placed = self.region if isinstance(self.region, Region) else Region(self.phrase, box=self.region)
            return cells(placed, height, width).view(1, height, width).to(anybody.device) & anybody
        if not state.gates:
            return None
        known = state.gates.get((height, width))
        if known is None:
            nearest = min(state.gates, key=lambda size: abs(size[0] * size[1] - height * width))
            given = state.gates[nearest][:, None].float()
            known = F.interpolate(given, size=(height, width), mode="nearest-exact")[:, 0] > 0
        return known & anybody
