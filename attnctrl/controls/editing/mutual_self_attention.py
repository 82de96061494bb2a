"""Mutual self-attention (MasaCtrl): an edit looks up its content in the source picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from attnctrl.control import Control, Where, Window, param
from attnctrl.controls.editing.sources import Sources
from attnctrl.sampling import Sampling
from attnctrl.sites import Call


@dataclass
class State:
    sources: Sources
    names: frozenset[str]


@dataclass(frozen=True)
class MutualSelfAttention(Control):
    """MasaCtrl (Cao et al., arXiv 2304.08465): keys and values of the source, queries of the edit.

    The run draws the source and its edits together: prompt=[source, edit, ...]. From `from_layer` on, in the order of
    the forward pass, the edits' latents attend to the source's, in each guidance branch to its own; so the edit's
    layout comes from its prompt and its appearance from the source. The paper starts at step 4 of 50 and at layer 10
    of 16. In joint attention the latents' keys and values are exchanged and the text's stay, as in Stable Flow
    (arXiv 2411.14430), whose vital layers are other ones. Families: all.
    """

    paper: ClassVar[str] = "arXiv 2304.08465"
    fixes: ClassVar[str] = "another pose or place, the same subject"

    window: Window = field(default=Window(0.08, 1.0), kw_only=True)
    where: Where = field(default=Where(kinds=("self", "joint")), kw_only=True)
    branches: tuple[str, ...] = field(default=("cond", "uncond"), kw_only=True)
    from_layer: float = param(0.625, "share of the layers, in order, that are left alone", 0, 1)

    @property
    def idle(self) -> bool:
        return self.window.empty or self.from_layer == 1

    def begin(self, sampling: Sampling) -> State:
        sites = self.where.select(sampling.sites, sampling.latent_grid)
        chosen = sites[round(self.from_layer * len(sites)) :]
        return State(Sources.of(sampling, self.name), frozenset(site.name for site in chosen))

    def inputs(self, call: Call, state: State) -> Call:
        latent = call.keys.latent
        if call.site.name not in state.names or latent.start == latent.stop:
            return call
        key, value = (state.sources.of_source(t[:, :, latent]) for t in (call.key, call.value))
        return call.change(key=_placed(call.key, key, latent), value=_placed(call.value, value, latent))


def _placed(whole: torch.Tensor, part: torch.Tensor, where: slice) -> torch.Tensor:
    changed = whole.clone()
    changed[:, :, where] = part
    return changed
