"""PrimeComposer: an object of one picture put into another, with the attention that it would have there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from attnctrl.control import Control, Where, param
from attnctrl.controls.editing.sources import Sources, on_trajectory
from attnctrl.errors import ControlError
from attnctrl.kernels import combine_masks
from attnctrl.regions import Box, Region
from attnctrl.sampling import Sampling
from attnctrl.sites import Call, Grid, Step

PIXELS = 8
"""The object is placed on a raster of so many pixels for each latent token."""


def infused(
    query: torch.Tensor, key: torch.Tensor, prior_query: torch.Tensor, prior_key: torch.Tensor, inside: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys, (batch, heads, tokens, 3 head_dim) from (batch, heads, tokens, head_dim), whose products are
    those of `query` and `key`, but for the tokens `inside`, bool (batch, 1, tokens, 1).

    With P = prior_query prior_key^T: the columns of these tokens are P's, and their rows are the transposed columns.
    """
    own, theirs = (~inside).to(query.dtype), inside.to(query.dtype)
    queries = torch.cat([query * own, prior_query * own, prior_key * theirs], dim=-1)
    return queries, torch.cat([key * own, prior_key * theirs, prior_query], dim=-1)


def placed(picture: Image.Image, mask: Image.Image, box: Box, size: tuple[int, int], how: Any) -> Image.Image:
    """A picture of `size`, (width, height), moved and scaled so that what the mask shows fits its box, in the middle.

    Black where nothing comes from. box: fractions of the result. how: one of PIL's resamplings.
    """
    x0, y0, x1, y1 = mask.getbbox() or (0, 0, *mask.size)
    left, top, right, bottom = box[0] * size[0], box[1] * size[1], box[2] * size[0], box[3] * size[1]
    back = max((x1 - x0) / (right - left), (y1 - y0) / (bottom - top))
    x, y = (x0 + x1) / 2 - back * (left + right) / 2, (y0 + y1) / 2 - back * (top + bottom) / 2
    return picture.transform(size, Image.Transform.AFFINE, (back, 0, x, 0, back, y), resample=how)


@dataclass
class State:
    """silhouette, box: bool (height, width) of the latent tokens. inside: by grid, the tokens of the object, bool
    (tokens,). words: (pictures, text tokens) bool.
    """

    sources: Sources
    silhouette: torch.Tensor
    box: torch.Tensor
    inside: dict[Grid, torch.Tensor]
    words: torch.Tensor


@dataclass(frozen=True)
class PrimeComposer(Control):
    """PrimeComposer (Wang et al., arXiv 2403.05053): progressively combined diffusion with attention steering.

    The run draws the background and the composition together: prompt=[background, composition]. `silhouette`, a mask
    of any kind that `Region` takes, shows the object in the picture `foreground`, which is scaled to fit `box`,
    fractions of the result. `trajectories`: of the background and of the foreground as `pictures` makes it, each
    (steps + 1, 1, channels, height, width) from noise to picture; EditPipeline makes them.
    The start is noise in the box, the foreground's inside the silhouette, the background's elsewhere. Correlation
    diffuser: until `infuse_until` the first picture of the run is not the background but the background with the
    composition's own object in it, and the self-attention logits that all its pixels have with the object's take the
    place of the composition's columns and, transposed, of its rows: by further channels of query and key, so that no
    map is materialised. Region-constrained cross-attention: the words of `phrase` are not seen outside the silhouette.
    Both in the conditional branch. Combination: until `hold_until` the composition is the background with the
    foreground's latents at the silhouette; until `blend_until` the background's outside the box; afterwards free.
    domain "same" pastes the object into the background before it is inverted; "cross" (a photo into a painting) does
    not, for which the code has hold_until 0.2 to 0.3 and infuse_until 0.3 to 0.6.
    Departures: the paper's prior is the background with the object, as here; the code's is the foreground's picture
    alone. TF-ICON's exceptional prompt, which is no text, is not used to invert: the prompt of the background is, at
    guidance 1; and the sampler is the run's, not DPM-Solver++. A token belongs to the object if any part of it does,
    so that coarse layers lose no thin ones. Put FollowSource before it. Families: UNets that predict noise.
    """

    paper: ClassVar[str] = "arXiv 2403.05053"
    fixes: ClassVar[str] = "an object pasted into another picture that does not belong there"

    where: Where = field(default=Where(kinds=("self", "cross")), kw_only=True)
    foreground: Any = field(default=None, compare=False)
    silhouette: Any = field(default=None, compare=False)
    box: Box = (0.25, 0.25, 0.75, 0.75)
    phrase: str = ""
    trajectories: Any = field(default=None, kw_only=True, compare=False)
    domain: str = param("same", "whether both pictures are of one kind", choices=("same", "cross"))
    infuse_until: float = param(0.3, "part of the run with the prior self-attention", 0, 1)
    hold_until: float = param(0.1, "part of the run in which the latents are the pasted ones", 0, 1)
    blend_until: float = param(0.8, "part of the run with the background's latents outside the box", 0, 1)
    seed: int = param(0, "of the noise in the box", 0)

    @property
    def idle(self) -> bool:
        return self.window.empty or self.foreground is None

    def pictures(self, source: Image.Image) -> list[Image.Image]:
        """The background and the foreground, placed in its box, whose trajectories it needs."""
        given = _upright(self.foreground)
        mask = self._mask(given.size)
        there = placed(given, mask, self.box, source.size, Image.Resampling.BICUBIC)
        shape = placed(mask, mask, self.box, source.size, Image.Resampling.NEAREST)
        if self.domain == "same":
            return [source, Image.composite(there, source.convert("RGB"), shape)]
        # Beyond the foreground's own edges there is no picture: its mean colour.
        mean = tuple(int(v) for v in np.asarray(given).reshape(-1, 3).mean(axis=0).round())
        covered = placed(Image.new("L", given.size, 255), mask, self.box, source.size, Image.Resampling.NEAREST)
        return [source, Image.composite(there, Image.new("RGB", source.size, mean), covered)]

    def _mask(self, size: tuple[int, int]) -> Image.Image:
        region = Region("the foreground", mask=self.silhouette)
        region.check_aspect(size[1], size[0])
        return Image.fromarray((region.raster(size[1], size[0], "nearest").numpy() * 255).astype(np.uint8))

    def begin(self, sampling: Sampling) -> State:
        sources = Sources.of(sampling, self.name)
        if sampling.prompt_count != 2:
            raise ControlError(
                f"{self.name} draws one composition beside its background: call the pipeline with prompt=[background, "
                f"composition], not with {sampling.prompt_count} prompts."
            )
        if self.trajectories is None or len(self.trajectories) != 2:
            raise ControlError(
                f"{self.name} needs the trajectories of the background and of the foreground: give both, or use "
                "EditPipeline."
            )
        if sampling.joint:
            raise ControlError(f"{self.name} steers separate self- and cross-attention: use a UNet.")
        _, height, width = sampling.latent_grid
        mask = self._mask(_upright(self.foreground).size)
        shape = placed(mask, mask, self.box, (width * PIXELS, height * PIXELS), Image.Resampling.NEAREST)
        region = Region("the object", mask=shape)
        box = Region("the object", box=self.box)

        def on(grid: Grid, one: Region) -> torch.Tensor:
            return one.raster(grid[1], grid[2], "any").bool().to(sampling.device)

        words = torch.zeros(2, sampling.text_tokens, dtype=torch.bool)
        if self.phrase:
            words[1, list(sampling.find(self.phrase, 1))] = True
        return State(
            sources,
            on(sampling.latent_grid, region),
            on(sampling.latent_grid, box),
            {grid: on(grid, region).flatten() for grid in sampling.grids(self.where)},
            words.to(sampling.device).repeat_interleave(sampling.images_per_prompt, dim=0),
        )

    def inputs(self, call: Call, state: State) -> Call:
        assert call.queries.grid is not None
        inside = state.inside[call.queries.grid]
        if call.site.kind == "cross":
            if not self.phrase:
                return call
            seen = inside[None, :, None] | ~state.words[:, None, :]
            return call.change(mask=combine_masks([m for m in (call.mask, seen[:, None]) if m is not None]))
        if call.step.progress >= self.infuse_until:
            return call
        there = inside[:, None] & state.sources.edits(call.query)
        prior = state.sources.of_source(call.query), state.sources.of_source(call.key)
        query, key = infused(call.query, call.key, *prior, there)
        return call.change(query=query, key=key)

    def noise(self, noise: torch.Tensor, sampling: Sampling, state: State) -> torch.Tensor:
        back, there = (one[0].to(noise).expand(state.sources.images, *noise.shape[1:]) for one in self.trajectories)
        generators = [torch.Generator().manual_seed(self.seed + i) for i in range(state.sources.images)]
        fresh = torch.stack([torch.randn(noise.shape[1:], generator=one) for one in generators]).to(noise)
        prior = torch.where(state.silhouette, there, back)
        return torch.cat([prior, torch.where(state.box & ~state.silhouette, fresh, prior)])

    def latents(self, latents: torch.Tensor, step: Step, state: State) -> torch.Tensor:
        back, there = (on_trajectory(one, step, latents, state.sources, self.name) for one in self.trajectories)
        drawn = latents[state.sources.images :]
        if step.progress < self.hold_until:
            drawn = torch.where(state.silhouette, there, back)
        elif step.progress < self.blend_until:
            drawn = torch.where(state.box, drawn, back)
        infuses = (step.index + 1) / step.total < self.infuse_until
        first = torch.where(state.silhouette, drawn, back) if infuses else back
        return torch.cat([first, drawn])


def _upright(picture: Any) -> Image.Image:
    if not isinstance(picture, Image.Image):
        raise ControlError(f"PrimeComposer: the foreground is a {type(picture).__name__}: give a PIL picture.")
    return picture.convert("RGB")
