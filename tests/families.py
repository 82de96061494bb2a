"""What each family's tiny pipelines establish: the cells of the matrix in docs/families.md, and its facts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

import attnctrl as ac
from attnctrl.errors import ControlError
from attnctrl.kernels import TokenGroups, probabilities
from attnctrl.processors import family_of
from attnctrl.sites import Call
from tests import tiny
from tests.parts import Tiny
from tests.probes import Inputs, Mask, Probs, Token
from tests.transformers import FAMILIES, draw
from tests.videos import VIDEOS

COLUMNS = ("none", "mask", "groups", "columns", "loss")
TOLERANCE = 1e-4
"""The largest relative error, max|a - b| / max|b|, that passes for rounding in float32."""

EXACT = "bit-identical"
ALL = ac.Where(kinds=("self", "cross", "joint"))
BOTH: dict[str, Any] = {"where": ALL, "branches": ("cond", "uncond")}
UNETS = {
    name: Tiny(make, guided={"guidance_scale": 4.0}, free={"guidance_scale": 1.0}, size=(32, 32), grid=grid, sites=0)
    for name, make, grid in (("sd", tiny.sd, (1, 16, 16)), ("sdxl", tiny.sdxl, (1, 16, 16)))
}
PIPELINES = {**UNETS, **FAMILIES, **VIDEOS}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference as a fraction of the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def everything(call: Call) -> TokenGroups:
    """The groups that hide nothing; the model's own padding stays hidden."""
    return TokenGroups.everything(call.query.shape[2], call.key.shape[2])


def stripes(call: Call) -> TokenGroups:
    """Even queries see even keys, odd ones odd keys, and all of them the first key, which is never padding."""
    queries, keys = (torch.arange(tokens.shape[2]) % 2 + 1 for tokens in (call.query, call.key))
    keys[0] = 3
    return TokenGroups(queries[None], keys[None])


class Measured:
    """One tiny pipeline put through the matrix: two guided steps from one seed, everything in float32."""

    def __init__(self, name: str) -> None:
        self.family = PIPELINES[name]
        self.pipe = self.family.make()

    def draw(self, *controls: ac.Control, **options: Any) -> torch.Tensor:
        """The latents under these controls."""
        with ac.control(self.pipe, *controls, **{"record": False, **options}) as run:
            drawn: torch.Tensor = draw(self.pipe, self.family, steps=2)
        self.run = run
        return drawn

    @cached_property
    def stock(self) -> torch.Tensor:
        drawn: torch.Tensor = draw(self.pipe, self.family, steps=2)
        return drawn

    @cached_property
    def striped(self) -> torch.Tensor:
        """The picture under the stripes with every probability materialised: the definition."""
        drawn = self.draw(Mask(make=stripes, **BOTH), Probs(**BOTH))
        assert relative(drawn, self.stock) > 10 * TOLERANCE
        return drawn

    def cell(self, column: str) -> str:
        """What the table says: "bit-identical", the largest relative error, or why it cannot be."""
        try:
            error: float = getattr(self, column)()
        except ControlError as reason:
            return f"cannot: {reason}"
        return EXACT if column == "none" and error == 0 else f"{error:.0e}" if error else "0"

    def none(self) -> float:
        """No control: the stock picture."""
        return 0.0 if torch.equal(self.draw(), self.stock) else relative(self.draw(), self.stock)

    def mask(self) -> float:
        """Every layer and branch under a dense mask: one that hides nothing, and stripes."""
        free = self.draw(Mask(make=lambda call: everything(call).dense(), **BOTH))
        drawn = self.draw(Mask(make=lambda call: stripes(call).dense(), **BOTH))
        return max(relative(free, self.stock), relative(drawn, self.striped))

    def groups(self) -> float:
        """The same by token groups."""
        free, drawn = self.draw(Mask(make=everything, **BOTH)), self.draw(Mask(make=stripes, **BOTH))
        return max(relative(free, self.stock), relative(drawn, self.striped))

    def columns(self) -> float:
        """The recorded map of a word, against the materialised probabilities of the layers that it is recorded from."""
        seen: dict[str, torch.Tensor] = {}

        def keep(call: Call) -> Call:
            probs = probabilities(call.query, call.key, call.mask, call.scale)
            if call.step.index == 0:
                seen[call.site.name] = probs[:, :, call.queries.latent, call.keys.text].mean(dim=1)
            return call

        self.draw(Inputs(edit=keep, where=ac.Where(near=1 / 16)), record=["dog"])
        positions = list(self.run.sampling.find("dog"))  # type: ignore[union-attr]
        expected = torch.stack([seen[name][0][:, positions].mean(dim=1) for name in sorted(seen)]).mean(dim=0)
        return relative(self.run.maps["dog"][0].flatten(), expected)

    def loss(self) -> float:
        """A loss descended through the columns, against the same through materialised probabilities."""
        loss = Token(scale=200.0)
        drawn = self.draw(loss)
        assert relative(drawn, self.stock) > TOLERANCE
        return relative(drawn, self.draw(loss, Probs(where=ALL)))


@dataclass(frozen=True)
class Facts:
    """What one tiny pipeline shows of its family."""

    pipeline: str
    text: str
    guidance: str
    sites: str


def facts(name: str) -> Facts:
    """Where its text stands, how its guidance branches are told apart, and which layers can be controlled."""
    measured, calls = Measured(name), []
    measured.draw(Inputs(edit=lambda call: (calls.append(call), call)[1], **BOTH))
    call = next(call for call in calls if call.site.kind != "self")
    if call.site.kind == "cross":
        text = "as keys of its own"
    else:
        text = f"{'before' if call.queries.text.start == 0 else 'after'} the latents, in one sequence"
    family = family_of(measured.pipe)
    order = list(dict.fromkeys(call.branch for call in calls))
    if order == ["cond"]:
        guidance = "one branch only"
    elif family.separate:
        guidance = f"two calls, {' then '.join(order)}"
    else:
        guidance = f"one batch, {' then '.join(branch.name for branch in family.branches(2, 1, 0))}"
    sites = measured.run.sampling.sites  # type: ignore[union-attr]
    shapes = dict.fromkeys((re.sub(r"\.\d+", ".*", site.name), site.kind) for site in sites)
    layers = ", ".join(f"`{shape}` ({kind})" for shape, kind in shapes)
    return Facts(type(measured.pipe).__name__, text, guidance, layers)
