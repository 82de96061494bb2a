"""SoftPAG: guidance away from a prediction with attention heads that mind themselves alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch

from attnctrl.control import Control, Where, param
from attnctrl.controls.guidance.common import OWN, middle, selected
from attnctrl.errors import ControlError
from attnctrl.guidance import Prediction
from attnctrl.headset import Head, load_heads
from attnctrl.sampling import Sampling
from attnctrl.sites import Call, Site, Step

Chosen = dict[str, tuple[int, ...] | None]
"""By the site's name, its perturbed heads; None for all."""


def softened(output: torch.Tensor, value: torch.Tensor, strength: float, heads: Sequence[int] | None) -> torch.Tensor:
    """(1 - u) * attention + u * value on some heads: the attention (1 - u) A + u I, for I v = v.

    output, value: (batch, heads, tokens, head_dim). strength: u in [0, 1]. heads: None for all.
    """
    mixed = torch.lerp(output, value.to(output.dtype), strength)
    if heads is None:
        return mixed
    chosen = torch.zeros(output.shape[1], dtype=torch.bool, device=output.device)
    chosen[list(heads)] = True
    return torch.where(chosen[:, None, None], mixed, output)


def choose(sites: Sequence[Site], heads: Sequence[str | Head] | None) -> Chosen:
    """The perturbed heads by site.

    heads: (site, head) for one head, a site's name or the path of a block above it for all of theirs; None for the
    middle layer. Raises ControlError for names that are no site's.
    """
    if heads is None:
        return {site.name: None for site in middle(sites)}
    chosen: dict[str, set[int] | None] = {}
    for entry in heads:
        name, head = (entry, None) if isinstance(entry, str) else entry
        found = [s.name for s in sites if s.name == name or (head is None and s.name.startswith(f"{name}."))]
        if not found:
            known = ", ".join(s.name for s in sites)
            raise ControlError(f'SoftPAG: "{name}" is no layer that it can act on: the layers are {known}.')
        for one in found:
            before = chosen.setdefault(one, set())
            chosen[one] = None if head is None or before is None else before | {int(head)}
    return {name: None if some is None else tuple(sorted(some)) for name, some in chosen.items()}


@dataclass(frozen=True)
class SoftPAG(Control):
    """SoftPAG (Ahn et al., arXiv 2506.10978), on single heads; with strength 1 on a layer, PAG (arXiv 2403.17377).

    A further conditional prediction p in each step, in which the attention of the chosen heads is
    (1 - u) A + u I with u = `strength`; what the pipeline combined gets `scale` * (cond - p) added. So it works with
    and without classifier-free guidance. All other controls act in p as they do in cond.
    heads: (layer, head) for single heads, a layer's name or the path of a block above it for all of theirs, or the
    file that `attnctrl headhunt` wrote; None for the middle layer: PAG's choice in UNets.

    In joint attention the latents' rows are perturbed, the text's stay. The paper's handling of the text in them is not
    known: here a latent of a perturbed head sees itself alone, no text. The number of heads per layer is read when the
    layer first runs. The further prediction is a call of its own, because the pipeline makes the first batch.
    Families: all; of layers with linear attention (SANA) only those that are sites.
    """

    paper: ClassVar[str] = "arXiv 2506.10978"
    fixes: ClassVar[str] = "broken structure and malformed objects; without a prompt too"

    heads: str | Path | Sequence[str | Head] | None = field(
        default=None, metadata={"help": "layers, or layer:head; the file of attnctrl headhunt"}
    )
    scale: float = param(3.0, "weight of the difference that is added", 0, 100)
    strength: float = param(1.0, "u: 0 is the stock attention, 1 the identity", 0, 1)
    where: Where = field(default=Where(kinds=OWN), kw_only=True)
    branches: tuple[str, ...] = field(default=("again",), kw_only=True)

    @property
    def idle(self) -> bool:
        none = self.heads is not None and not isinstance(self.heads, str | Path) and len(self.heads) == 0
        return self.window.empty or self.scale == 0 or self.strength == 0 or none

    def _chosen(self, sampling: Sampling) -> Chosen:
        heads = load_heads(self.heads) if isinstance(self.heads, str | Path) else self.heads
        return choose(selected(self, sampling, self.where), heads)

    def begin(self, sampling: Sampling) -> Chosen:
        return self._chosen(sampling)

    def sites(self, sampling: Sampling) -> list[Site]:
        names = self._chosen(sampling)
        return [site for site in sampling.sites if site.name in names]

    def output(self, output: torch.Tensor, call: Call, state: Chosen) -> torch.Tensor:
        heads, count = state[call.site.name], output.shape[1]
        if heads is not None and not 0 <= heads[0] <= heads[-1] < count:
            wrong = next(h for h in heads if not 0 <= h < count)
            raise ControlError(f"SoftPAG: {call.site.name} has heads 0 to {count - 1}, and no head {wrong}.")
        seen, made = call.keys.latent, call.queries.latent
        if seen.stop - seen.start != made.stop - made.start:
            raise ControlError(
                f"SoftPAG: at {call.site.name} the latents do not see themselves token by token: choose other layers."
            )
        rows = softened(output[:, :, made], call.value[:, :, seen], self.strength, heads)
        return torch.cat([output[:, :, : made.start], rows, output[:, :, made.stop :]], dim=2)

    def guide(self, prediction: Prediction, step: Step, state: Chosen) -> torch.Tensor:
        perturbed = prediction.again(controlled=True)
        return prediction.combined + self.scale * (prediction.own - perturbed)
