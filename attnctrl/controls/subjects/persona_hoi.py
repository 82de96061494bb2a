"""PersonaHOI: the plain model draws what a person does, the personalised one only the head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch

from attnctrl.control import Control, Where, param
from attnctrl.controls.editing.sources import Sources
from attnctrl.controls.subjects.delayed_subject import fitted
from attnctrl.errors import ControlError
from attnctrl.layout import Regions, per_prompt
from attnctrl.references import cells
from attnctrl.regions import Region
from attnctrl.sampling import Sampling
from attnctrl.sites import Call, Step, Stream


def low_pass(features: torch.Tensor, sigma: float) -> torch.Tensor:
    """A Gaussian mean over the last two axes, of standard deviation `sigma` in cells, > 0.

    Weights are normalised at the edge, so that a constant stays. features: (..., height, width).
    """

    def weights(side: int) -> torch.Tensor:
        place = torch.arange(side, device=features.device, dtype=torch.float32)
        falling = torch.exp(-((place[:, None] - place) ** 2) / (2 * sigma**2))
        return (falling / falling.sum(dim=1, keepdim=True)).to(features.dtype)

    return weights(features.shape[-2]) @ features @ weights(features.shape[-1]).T


def merged(plain: torch.Tensor, own: torch.Tensor, inside: torch.Tensor, sigma: float) -> torch.Tensor:
    """The details of `own` where `inside`, the coarse part of `plain` elsewhere: M HP(own) + (1 - M) LP(plain).

    plain, own: (batch, channels, height, width). inside: bool (batch, 1, height, width).
    """
    return torch.where(inside, own - low_pass(own, sigma), low_pass(plain, sigma))


@dataclass
class State:
    """text: (pictures, tokens, channels), with the embeddings. heads: of each prompt its regions. words: bool
    (pictures, heads, tokens), whose tokens are seen only there. rows: bool (pictures,), the personalised ones.
    """

    sources: Sources
    text: torch.Tensor
    heads: list[list[Region]]
    words: torch.Tensor
    rows: torch.Tensor
    grids: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    def inside(self, height: int, width: int) -> torch.Tensor:
        """Where each head is, bool (pictures, heads, height * width); prompts with fewer have empty rows."""
        if (height, width) not in self.grids:
            found = torch.zeros(len(self.heads), self.words.shape[1], height * width, dtype=torch.bool)
            for p, regions in enumerate(self.heads):
                for i, region in enumerate(regions):
                    found[p, i] = cells(region, height, width)
            self.grids[height, width] = found.to(self.words.device).repeat_interleave(self.sources.images, dim=0)
        return self.grids[height, width]

    def own(self, like: torch.Tensor) -> torch.Tensor:
        """Where the personalised rows keep what is theirs, bool (pictures, 1, height, width) of `like`."""
        return self.inside(*like.shape[-2:]).any(dim=1, keepdim=True).unflatten(2, like.shape[-2:])


@dataclass(frozen=True)
class PersonaHOI(Control):
    """PersonaHOI (arXiv 2501.05823): a person's face in an interaction that the personalised model cannot draw.

    The run draws the prompt twice from the same noise, prompt=[prompt, prompt] with equal generators: the first row is
    the plain model's, and stays as it is; the others are personalised. regions: the heads, each with a phrase of
    `embeddings`, for every prompt or a list per prompt; a prompt with none is left alone, the first one's are not read.
    embeddings: what takes the place of a phrase's last tokens, as in `DelayedSubject`, from the first step on.
    In the personalised rows the tokens with embeddings are seen inside their head alone (their probability is
    multiplied by the mask and nothing is renormalised); after every step the latents outside all heads are the plain
    row's; and every skip connection of the UNet hands its decoder the details of the row's own features inside the
    heads and the coarse part of the plain row's outside, parted by a Gaussian whose standard deviation, in cells,
    falls linearly from `sigma_start` to `sigma_end`. Without `skips` they are left alone; that merging takes the mean
    of the features from the head, which the paper keeps.
    Departures: the paper's head is found by DensePose on a draft, here it is given; its models are FastComposer,
    PhotoMaker and IP-Adapter, here it is any embedding in the place of words; where its masks meet cells, a cell
    belongs to a head that covers half of it. Read from a description of the paper, whose code was not to be had.
    Families: UNets, not under torch.compile.
    """

    paper: ClassVar[str] = "arXiv 2501.05823"
    fixes: ClassVar[str] = "a personalised model that forgets what the person does"

    where: Where = field(default=Where(kinds=("cross",)), kw_only=True)
    branches: tuple[str, ...] = field(default=("cond", "uncond"), kw_only=True)
    regions: Regions = ()
    embeddings: Mapping[str, torch.Tensor] = field(default_factory=dict, compare=False)
    skips: bool = param(True, "whether the skip connections are merged too")
    sigma_start: float = param(2.5, "of the Gaussian in the first step, in cells", 0.01, 100)
    sigma_end: float = param(0.5, "of the Gaussian at the end, in cells", 0.01, 100)

    @property
    def idle(self) -> bool:
        return self.window.empty or not self.embeddings or not any(self.regions)

    def begin(self, sampling: Sampling) -> State:
        if sampling.prompt_count < 2:
            raise ControlError(
                "PersonaHOI draws the prompt plain and personalised in one run: call the pipeline with "
                "prompt=[prompt, prompt] and equal generators."
            )
        if not sampling.skips:
            raise ControlError("PersonaHOI merges the skip connections of a UNet, and this model has none.")
        heads = [[], *per_prompt(self.regions, sampling.prompt_count)[1:]]
        images, count = sampling.images_per_prompt, max(1, *(len(regions) for regions in heads))
        words = torch.zeros(sampling.prompt_count, count, sampling.text_tokens, dtype=torch.bool)
        texts = list(sampling.encode(list(sampling.prompts or [])).positive)
        for p, regions in enumerate(heads):
            for i, region in enumerate(regions):
                region.check_aspect(*sampling.latent_grid[1:])
                if region.phrase not in self.embeddings:
                    raise ControlError(f'PersonaHOI has a head of "{region.phrase}" and no embedding for it.')
                texts[p], places = fitted(
                    texts[p], sampling, p, region.phrase, self.embeddings[region.phrase], self.name
                )
                words[p, i, list(places)] = True

        def rows(per_prompt: torch.Tensor) -> torch.Tensor:
            return per_prompt.to(sampling.device).repeat_interleave(images, dim=0)

        state = State(
            Sources(sampling.prompt_count, images),
            rows(torch.stack(texts).to(sampling.dtype)),
            heads,
            rows(words),
            rows(torch.tensor([bool(regions) for regions in heads])),
        )
        if self.skips:
            assert sampling.edit_features is not None
            for site in sampling.skips:
                sampling.edit_features(site, partial(self._skip, state))
        return state

    def _skip(self, state: State, features: torch.Tensor, step: Step) -> torch.Tensor:
        sigma = self.sigma_start + (self.sigma_end - self.sigma_start) * step.progress
        mixed = merged(state.sources.of_source(features), features, state.own(features), sigma)
        return torch.where(state.rows[:, None, None, None], mixed, features)

    def inputs(self, call: Call, state: State) -> Call:
        if call.branch != "cond":
            return call
        assert call.project is not None
        assert call.queries.grid is not None
        personal = state.rows[:, None, None, None]
        theirs = call.project(state.text)
        key, value = (torch.where(personal, new, old) for new, old in zip(theirs, (call.key, call.value), strict=True))
        inside = state.inside(*call.queries.grid[1:]).to(value.dtype)
        # A column of probabilities times its value: what the mask takes from the one it may take from the other.
        held = [value * state.words[:, None, i, :, None] for i in range(state.words.shape[1])]
        streams = [Stream(key, one, inside[:, None, i, :, None], call.mask) for i, one in enumerate(held)]
        free = value * ~state.words.any(dim=1)[:, None, :, None]
        return call.change(key=key, value=free, streams=(*call.streams, *streams))

    def latents(self, latents: torch.Tensor, step: Step, state: State) -> torch.Tensor:
        outside = state.rows[:, None, None, None] & ~state.own(latents)
        return torch.where(outside, state.sources.of_source(latents), latents)
