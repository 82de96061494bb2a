"""LIME: the region of an instruction from clustered features, and in it no attention to unrelated words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from attnctrl.control import Control, Where, Window, param
from attnctrl.controls.editing.found import given, on_grid, resized, share
from attnctrl.controls.guidance.common import selected
from attnctrl.errors import ControlError
from attnctrl.kernels import probabilities
from attnctrl.prompt import PromptTokens
from attnctrl.sampling import Sampling
from attnctrl.sites import Call, Grid, Step
from attnctrl.stepmaps import phrase_maps

_STOP = (
    "a about above after again all also an and any are as at be been before below between both but by can could did do "
    "does down each few for from further had has have he her here him his how i if in into is it its just may me more "
    "most my no nor not of off on once only or other our out over own same shall she should so some such than that the "
    "their them then there these they this those through to too under until up very was we were what when where which "
    "while who why will with would you your"
)
STOP_WORDS = frozenset(_STOP.split())
"""English words that say nothing of their own."""
_VERBS = (
    "add apply become change color colour convert cover create cut delete draw dress edit erase exchange fill get give "
    "insert keep leave let make modify move paint place put recolor recolour remove render replace set show swap take "
    "transform turn use wear"
)
EDIT_VERBS = frozenset(_VERBS.split())
"""Verbs of instructions, which do not say where."""
UNMASKED_SHARE = 1 / 16
"""Layers of no more of the latents' tokens are left alone: 16x16 of 64x64 and coarser."""


def worded(tokens: PromptTokens) -> list[tuple[int, str]]:
    """Position and word of each token of a prompt, the special ones left out; marks that are no word give "".

    What the encoder's window cuts off is left out too.
    """
    words = list(re.finditer(r"\w+", tokens.prompt))
    return [
        (i + tokens.offset, next((w[0].lower() for w in words if w.start() < b and w.end() > a), ""))
        for i, (a, b) in enumerate(tokens.spans[: tokens.limit - 1])
        if a < b
    ]


def effective(tokens: PromptTokens) -> list[int]:
    """The tokens that stay visible inside the region: all words but stop words, and the end-of-text token."""
    return [*(i for i, word in worded(tokens) if word not in STOP_WORDS), tokens.end + tokens.offset]


def relevant(tokens: PromptTokens) -> list[int]:
    """The tokens whose maps show the region: no stop words, no verbs of instructions, no marks."""
    return [i for i, word in worded(tokens) if word and word not in STOP_WORDS | EDIT_VERBS]


def k_means(points: torch.Tensor, count: int, seed: int = 0, rounds: int = 100) -> torch.Tensor:
    """The cluster of each point, (n,), of at most `count`: Lloyd's algorithm after k-means++ from a fixed seed.

    points: (n, channels).
    """
    generator = torch.Generator().manual_seed(seed)

    def apart(centres: torch.Tensor) -> torch.Tensor:
        return torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist").square()

    centres = points[torch.randint(len(points), (1,), generator=generator)]
    while len(centres) < count:
        nearest = apart(centres).amin(dim=1).cpu()
        if not bool(nearest.any()):
            break  # there are no more different points
        centres = torch.cat([centres, points[torch.multinomial(nearest, 1, generator=generator)]])
    labels = apart(centres).argmin(dim=1)
    for _ in range(rounds):
        sizes = torch.bincount(labels, minlength=len(centres))[:, None]
        sums = torch.zeros_like(centres).index_add(0, labels, points)
        centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
        before, labels = labels, apart(centres).argmin(dim=1)
        if torch.equal(before, labels):
            break
    return labels


def region_of(features: torch.Tensor, relevance: torch.Tensor, clusters: int, top: int) -> torch.Tensor:
    """The clusters that the `top` most relevant pixels belong to, bool (pixels,).

    features: (pixels, channels), normalised here to unit length. relevance: (pixels,).
    """
    labels = k_means(F.normalize(features.float(), dim=-1), clusters)
    return torch.isin(labels, labels[relevance.topk(min(top, len(relevance))).indices])


@dataclass
class State:
    """effective, relevant: bool (pictures, text tokens). features: by branch and site, (pictures, tokens, channels);
    maps: by site, (pictures, 1, tokens); both of the step that is read. region: bool (pictures, 1, height, width) of
    the latents, once it is known.
    """

    latents: Grid
    effective: torch.Tensor
    relevant: torch.Tensor
    features: dict[tuple[str, str], tuple[torch.Tensor, Grid]] = field(default_factory=dict)
    maps: dict[str, tuple[torch.Tensor, Grid]] = field(default_factory=dict)
    region: torch.Tensor | None = None

    def find(self, clusters: int, top: int) -> torch.Tensor:
        """The region, made once of what was read."""
        if self.region is None:
            _, height, width = self.latents
            branch = "image" if any(name == "image" for name, _ in self.features) else "cond"
            chosen = [one for (name, _), one in self.features.items() if name == branch]
            features = torch.cat([resized(f.transpose(1, 2), grid, self.latents) for f, grid in chosen], dim=1)
            maps = torch.stack([resized(m, grid, self.latents) for m, grid in self.maps.values()]).mean(dim=0)
            rows = [region_of(f.flatten(1).T, m.flatten(), clusters, top) for f, m in zip(features, maps, strict=True)]
            self.region = torch.stack(rows).reshape(-1, 1, height, width)
            self.features.clear()
            self.maps.clear()
        return self.region


@dataclass(frozen=True)
class Lime(Control):
    """LIME (Simsar et al., WACV 2025, arXiv 2312.09256): instruction editing that finds its own region.

    At the last step before `find_at` two things are read: the attention's outputs in the branch that sees the picture
    and no text, which are clustered by k-means on unit vectors; and the maps of the instruction's words, without stop
    words and verbs of instructions (`words` names others). The region is the clusters that the `top` pixels of these
    maps belong to; `mask`, of any kind that `Region` takes, takes its place. From then on, in cross-attention layers of
    more than a sixteenth of the latents' tokens, a latent inside the region sees only the words that are no stop words,
    and the end-of-text token, in all guidance branches alike: neither the start token, nor padding, nor stop words.
    Outside the region nothing changes.

    The paper draws twice from one seed: at a text guidance of 5.5 to find the region, then at 2 with it from the first
    step on (`InstructPipeline` does so). With one control in one run, all of it happens in one pass, and the
    first steps are those of the stock pipeline. Departures: outputs are read before the layer's last projection and
    brought to the latents' own grid, not to twice that; the words' lists are our own and verbs are looked up, not
    parsed. The code hides words by the smallest number, not by the paper's finite penalty; so does this.
    Families: UNets; meant for InstructPix2Pix. Where no branch sees the picture alone, the conditional one is read.
    """

    paper: ClassVar[str] = "arXiv 2312.09256"
    fixes: ClassVar[str] = "an instruction that bleeds over the whole picture"

    where: Where = field(default=Where(kinds=("cross", "self")), kw_only=True)
    window: Window = field(default=Window(0.0, 0.9), kw_only=True)
    branches: tuple[str, ...] = field(default=("cond", "image", "uncond"), kw_only=True)
    words: Sequence[str] = field(
        default=(), metadata={"help": "words of the instruction that say where; none: all but stop words and verbs"}
    )
    region: Any = field(default=None, compare=False)
    clusters: int = param(8, "k-means clusters of features", 2, 256)
    top: int = param(1, "latent pixels that choose clusters", 1, 100000)
    find_at: float = param(0.35, "part of the run after which the region is known", 0.01, 1)
    read_share: float = param(0.25, "tokens of the finest layers that are read, as a share of the latents'", 0.001, 1)

    @property
    def idle(self) -> bool:
        return self.window.empty

    def _reads(self, step: Step) -> bool:
        """Whether this is the last step before `find_at`."""
        return self.region is None and step.progress < self.find_at <= (step.index + 1) / step.total

    def acts(self, step: Step, branch: str, state: State) -> bool:
        masks = self.region is not None or step.progress >= self.find_at
        return super().acts(step, branch, state) and (masks or self._reads(step))

    def begin(self, sampling: Sampling) -> State:
        if sampling.prompts is None:
            raise ControlError("Lime reads the instruction's words: name them with control(pipe, ..., prompt=...).")
        selected(self, sampling, self.where)
        marked = torch.zeros(2, sampling.prompt_count, sampling.text_tokens, dtype=torch.bool)
        for p, encoders in enumerate(sampling.tokens):
            shows = [i for phrase in self.words for i in sampling.find(phrase, p)]
            for tokens in encoders:
                marked[0, p, effective(tokens)] = True
                marked[1, p, shows or relevant(tokens)] = True
        if self.region is None:
            self._check(sampling, marked[1])
        seen, shown = marked.repeat_interleave(sampling.images_per_prompt, dim=1).to(sampling.device)
        region = None if self.region is None else given([self.region], sampling)
        return State(sampling.latent_grid, seen, shown, region=region)

    def _check(self, sampling: Sampling, relevant: torch.Tensor) -> None:
        """Raise ControlError where the region could not be found."""
        if not bool(relevant.any(dim=1).all()):
            raise ControlError(
                f'Lime finds no word that says where in "{(sampling.prompts or [""])[0]}": name some in words, or '
                "give the region."
            )
        if self.window.start >= self.find_at or self.window.end <= self.find_at:
            raise ControlError(
                f"Lime reads the region before {self.find_at:g} of the run and uses it afterwards, and its window is "
                f"{self.window.start:g} to {self.window.end:g}: widen the window, or give the region."
            )
        if not any(s.kind == "cross" and share(s) <= self.read_share for s in sampling.sites):
            raise ControlError(
                f"Lime finds no cross-attention of {self.read_share:g} or less of the latents' tokens to read: raise "
                "read_share."
            )

    def inputs(self, call: Call, state: State) -> Call:
        if call.branch == "cond" and call.site.kind == "cross" and self._read_here(call):
            probs = probabilities(call.query, call.key, call.mask, call.scale).mean(dim=1)
            assert call.queries.grid is not None
            state.maps[call.site.name] = phrase_maps(probs, state.relevant[:, None]), call.queries.grid
        return call

    def output(self, output: torch.Tensor, call: Call, state: State) -> torch.Tensor:
        if call.branch in ("cond", "image") and self._read_here(call):
            assert call.queries.grid is not None
            state.features[call.branch, call.site.name] = output.transpose(1, 2).flatten(2).float(), call.queries.grid
        return output

    def _read_here(self, call: Call) -> bool:
        return self._reads(call.step) and share(call.site) <= self.read_share

    def mask(self, call: Call, state: State) -> torch.Tensor | None:
        coarse = share(call.site) <= UNMASKED_SHARE
        if call.site.kind != "cross" or coarse or self._reads(call.step):
            return None
        assert call.queries.grid is not None
        inside = on_grid(state.find(self.clusters, self.top), call.queries.grid)
        return ~inside[..., None] | state.effective[:, None, None]
