"""Plug-and-Play: an edit keeps the structure of its source, whose features and self-attention it is given."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch

from attnctrl.control import Control, Where, Window, param
from attnctrl.controls.editing.sources import Sources
from attnctrl.errors import ControlError
from attnctrl.sampling import Sampling
from attnctrl.sites import Call, Step


@dataclass
class State:
    """names: the sites whose self-attention is the source's."""

    sources: Sources
    names: frozenset[str]


@dataclass(frozen=True)
class PlugAndPlay(Control):
    """Plug-and-Play diffusion features (Tumanyan et al., arXiv 2211.12572): the source's structure, other appearance.

    The run draws the source and its edits together: prompt=[source, edit, ...]. Until `features_until` of the run one
    residual block of the decoder adds to the edits what it adds to the source (the paper's f_t^4); until
    `attention_until` the self-attention from there on has the source's queries and keys (its A_t^4 to A_t^11). Both
    happen in each guidance branch, with that branch's own source. The paper takes the fifth of the twelve residual
    blocks in the decoder of Stable Diffusion; here it is the same share of however many there are. No point of a run
    reaches convolutions: the features go through `Sampling.edit_features`, a hook on the block's second convolution
    that goes when the run ends. The paper's inversion has 1000 steps and its negative prompt is the source's; see the
    inversions "direct" and "negative-prompt". Families: UNets, not under torch.compile.
    """

    paper: ClassVar[str] = "arXiv 2211.12572"
    fixes: ClassVar[str] = "another appearance that changes the shapes as well"

    window: Window = field(default=Window(), kw_only=True)
    where: Where = field(default=Where(kinds=("self",), blocks=("up",)), kw_only=True)
    branches: tuple[str, ...] = field(default=("cond", "uncond"), kw_only=True)
    features_until: float = param(0.8, "part of the run with the source's features", 0, 1)
    attention_until: float = param(0.5, "part of the run with the source's self-attention", 0, 1)
    from_block: float = param(1 / 3, "share of the decoder's residual blocks before the one that is taken", 0, 1)

    @property
    def idle(self) -> bool:
        return self.window.empty or not (self.features_until or self.attention_until)

    def begin(self, sampling: Sampling) -> State:
        sources = Sources.of(sampling, self.name)
        decoder = [site for site in sampling.residuals if site.block == "up"]
        if not decoder:
            raise ControlError(
                f"{self.name} takes features of a UNet's decoder, and this model has none: use MutualSelfAttention."
            )
        first = decoder[min(round(self.from_block * len(decoder)), len(decoder) - 1)]
        if self.features_until:
            assert sampling.edit_features is not None
            sampling.edit_features(first, partial(self._features, sources))
        sites = self.where.select(sampling.sites, sampling.latent_grid)
        return State(sources, frozenset(site.name for site in sites if site.order >= first.order))

    def _features(self, sources: Sources, features: torch.Tensor, step: Step) -> torch.Tensor:
        return sources.of_source(features) if step.progress < self.features_until else features

    def inputs(self, call: Call, state: State) -> Call:
        if call.step.progress >= self.attention_until or call.site.name not in state.names:
            return call
        return call.change(query=state.sources.of_source(call.query), key=state.sources.of_source(call.key))
