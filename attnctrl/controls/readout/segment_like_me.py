"""SLiMe: the parts of one annotated picture become embeddings, and those find the same parts in any picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from attnctrl.control import Control, Descent, Loss, Where, Window, param
from attnctrl.controls.reading import MeanMaps, before, carried, enlarged, own_map, text_shares
from attnctrl.controls.readout.learned import as_picture, finest, first_word, ground_token, learned_words
from attnctrl.controls.readout.segment import ALL, unit_range
from attnctrl.errors import ControlError
from attnctrl.sampling import Sampling
from attnctrl.sites import Call, Site, Step
from attnctrl.stepmaps import SelfMap, StepMaps
from attnctrl.text import Text

if TYPE_CHECKING:
    from attnctrl.run import Run


def shares(probs: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Each part's share of what the parts get together: (batch, latent tokens, text tokens) -> (..., parts)."""
    chosen = probs[..., places]
    return chosen / chosen.sum(dim=-1, keepdim=True).clamp(min=1e-12)


def coarse_labels(labels: torch.Tensor, parts: int, height: int, width: int) -> torch.Tensor:
    """The label that covers most of each cell, (height, width) int; labels: (rows, columns) int in 0 .. parts - 1."""
    covered = F.one_hot(labels.long(), parts).permute(2, 0, 1)[None].float()
    return F.interpolate(covered, size=(height, width), mode="area")[0].argmax(dim=0)


def part_weights(labels: torch.Tensor, parts: int) -> torch.Tensor:
    """Weights of the cross-entropy: 1 for the background, pixels / the part's pixels for the others that are there."""
    counts = torch.bincount(labels.flatten(), minlength=parts).float()
    weights = torch.where(counts > 0, labels.numel() / counts.clamp(min=1), 0.0)
    weights[0] = 1.0
    return weights


def map_loss(maps: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted cross-entropy of shares (batch, parts, height, width) and labels (height, width): (batch,)."""
    chosen = labels.expand(len(maps), *labels.shape)
    error = F.nll_loss(maps.clamp(min=1e-12).log(), chosen, weights, reduction="none")
    return error.flatten(1).sum(dim=1) / weights[labels].sum()


def spread_loss(maps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean square distance of maps (batch, parts, height, width) to the labels' own, times the parts; (batch,)."""
    wanted = F.one_hot(labels, maps.shape[1]).permute(2, 0, 1).to(maps.dtype)
    return (maps - wanted).square().flatten(1).mean(dim=1) * maps.shape[1]


def rescaled(maps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Each map (..., height, width) brought to the range of its counterpart in `like`."""
    low, high = like.amin(dim=(-2, -1), keepdim=True), like.amax(dim=(-2, -1), keepdim=True)
    return unit_range(maps) * (high - low) + low


def by_cells(maps: Sequence[torch.Tensor], height: int, width: int) -> torch.Tensor:
    """The mean of maps (batch, parts, rows, columns) at one size, each counting by its number of cells."""
    cells = [m.shape[-2] * m.shape[-1] for m in maps]
    return torch.stack([enlarged(m, height, width) * n / sum(cells) for m, n in zip(maps, cells, strict=True)]).sum(0)


@dataclass
class State:
    """places: of the background's token and those of the parts. pairs, own: as in Segment.

    plain: of the parts' shares; spread: of the same carried on; strength: of what each part gets among all tokens.
    """

    places: torch.Tensor
    pictures: int
    tokens: int
    labels: torch.Tensor | None
    pairs: dict[str, tuple[Site, Site | None]]
    own: dict[str, SelfMap] = field(default_factory=dict)
    plain: MeanMaps = field(default_factory=MeanMaps)
    spread: MeanMaps = field(default_factory=MeanMaps)
    strength: MeanMaps = field(default_factory=MeanMaps)


@dataclass(frozen=True)
class SegmentLikeMe(Control):
    """Segment Like Me (Khani et al., ICLR 2024, arXiv 2309.03179).

    With `labels`, (height, width) integers from 0 for the background, it learns: beside `HoldPicture` of the annotated
    picture, Adam moves the embeddings of as many words as there are parts, so that their shares of the attention are
    the labels (cross-entropy, rare parts weighted up), also when self-attention has carried the shares on (mean square
    error). `words(run)` then gives them, and with these as `embeddings` it reads: they take the place of the prompt's
    first words, and `read(run, size)` gives the labels of whatever the run draws or holds. The background is the start
    token, which stays (in encoders without one, the end of the text).

    Departures: shares of the mean probabilities of the heads, where the code averages logits; S P, the mean of what a
    pixel looks at, brought to the range of P as there, where it sums the rows of S by P; no third loss on the
    prediction; no crops; all layers that `where` keeps, the finer ones counting more; the background's map is not cut
    off below its mean. A part is absent where its attention among all tokens stays below `presence` everywhere, and
    pixels that would be its own go to the next. Put HoldPicture after it, and draw with guidance 1. Families: all for
    pictures whose text is one tensor (SANA: spread_weight=0).
    """

    paper: ClassVar[str] = "arXiv 2309.03179"
    fixes: ClassVar[str] = "masks of parts that no word names, from one example"

    labels: Any = field(default=None, compare=False)
    embeddings: torch.Tensor | None = field(default=None, compare=False, kw_only=True)
    rate: float = param(0.1, "Adam's learning rate on the embeddings", 0, 10)
    iterations: int = param(20, "moves per step", 0, 1000)
    spread_weight: float = param(1.0, "weight of the loss on the maps that self-attention carried on", 0, 10)
    presence: float = param(0.2, "attention that a part must get somewhere to be there at all", 0, 1)
    window: Window = field(default=Window(0.6, 1.0), kw_only=True)
    where: Where = field(default=ALL, kw_only=True)

    @property
    def idle(self) -> bool:
        nothing = self.labels is None or self.rate == 0 or self.iterations == 0 or np.size(self.labels) == 0
        return self.window.empty or (self.embeddings is None and nothing)

    @property
    def parts(self) -> int:
        """How many parts there are, the background among them."""
        if self.embeddings is not None:
            return len(self.embeddings) + 1
        return int(np.max(np.asarray(self.labels))) + 1

    def context(self, text: Text, sampling: Sampling) -> Text:
        if self.embeddings is None:
            return text
        first, changed = first_word(sampling, self.name), text.positive.clone()
        if first + self.parts - 1 > changed.shape[1] or self.embeddings.shape[1:] != changed.shape[2:]:
            raise ControlError(
                f"SegmentLikeMe: the embeddings have the shape {tuple(self.embeddings.shape)}, and the run's text "
                f"{tuple(changed.shape)}: learn them with the same model."
            )
        changed[:, first : first + self.parts - 1] = self.embeddings.to(changed)
        return text.change(positive=changed)

    def begin(self, sampling: Sampling) -> State:
        if sampling.latent_grid[0] > 1:
            raise ControlError("SegmentLikeMe makes masks of pictures: it has no form for videos.")
        labels = None
        if self.embeddings is None:
            labels = torch.as_tensor(np.asarray(self.labels)).to(sampling.device)
            if labels.ndim != 2 or labels.is_floating_point() or int(labels.min()) < 0 or self.parts < 2:
                raise ControlError(
                    "SegmentLikeMe: labels must be (height, width) integers, 0 for the background and one number for "
                    f"each part; these are {labels.dtype} of shape {tuple(labels.shape)}, up to {self.parts - 1}."
                )
        first = first_word(sampling, self.name)
        if first + self.parts - 1 > sampling.text_tokens:
            raise ControlError(f"SegmentLikeMe: {self.parts - 1} parts do not fit {sampling.text_tokens} text tokens.")
        places = torch.tensor([ground_token(sampling), *range(first, first + self.parts - 1)], device=sampling.device)
        sites = self.where.select(sampling.sites, sampling.latent_grid)
        alone = [s for s in sites if s.kind == "self"]
        pairs = {s.name: (s, before(s, alone)) for s in sites if s.kind != "self"}
        return State(places, sampling.batch, sampling.text_tokens, labels, pairs)

    def sites(self, sampling: Sampling) -> list[Site]:
        """What is read by the loss needs no look of its own."""
        return [] if self.embeddings is None else super().sites(sampling)

    # learning -----------------------------------------------------------------------------------------------
    def learned(self, state: State) -> torch.Tensor:
        chosen = torch.zeros(state.pictures, state.tokens, dtype=torch.bool, device=state.places.device)
        chosen[:, state.places[1:]] = True
        return chosen

    def descent(self, step: Step) -> Descent | None:
        return Descent(self.rate, self.iterations, adam=True) if self.embeddings is None else None

    def loss(self, maps: StepMaps, step: Step, state: State) -> Loss:
        assert state.labels is not None
        layers = maps.cross_layers()
        height, width = finest(layers)
        mean = by_cells([as_picture(shares(one.probs, state.places), one) for one in layers], height, width)
        labels = coarse_labels(state.labels, self.parts, height, width)
        value = map_loss(mean, labels, part_weights(labels, self.parts))
        if self.spread_weight:
            own = maps.self_layers((1, height, width))
            spread = torch.stack([carried(mean.flatten(2), one, 1) for one in own]).mean(dim=0)
            value = value + self.spread_weight * spread_loss(spread.unflatten(-1, (height, width)), labels)
        return Loss(value)

    def words(self, run: Run) -> torch.Tensor:
        """The embeddings learned in the run's last call from its first picture, (parts - 1, channels)."""
        gained, state = learned_words(run, self), run.state(self)
        assert run.sampling is not None
        assert run.sampling.prompts is not None
        start = run.sampling.encode(run.sampling.prompts[:1]).positive[0].detach().float().cpu()
        return (start + gained[0, : len(start)])[state.places[1:].cpu()]

    # reading ------------------------------------------------------------------------------------------------
    def inputs(self, call: Call, state: State) -> Call:
        if call.site.kind != "cross":
            state.own[call.site.name] = own_map(call)
        if call.site.kind != "self":
            _, looked = state.pairs[call.site.name]
            probs, grid = text_shares(call)[..., : state.tokens], call.queries.grid
            assert grid is not None
            mine = shares(probs, state.places).transpose(1, 2)
            carried_on = carried(mine, None if looked is None else state.own.get(looked.name), 1)
            state.plain.add(call.step.index, call.site.name, grid, mine)
            state.spread.add(call.step.index, call.site.name, grid, carried_on)
            state.strength.add(call.step.index, call.site.name, grid, probs[..., state.places].transpose(1, 2))
        return call

    def read(self, run: Run, size: tuple[int, int]) -> torch.Tensor:
        """The labels (pictures, height, width) in the run's last call at `size` (width, height), 0 for background.

        Raises ControlError where nothing was read.
        """
        state: State = run.state(self)
        width, height = size
        found = [[*means.means().values()] for means in (state.plain, state.spread, state.strength)]
        if not found[0]:
            raise ControlError("SegmentLikeMe has read nothing: give embeddings, and a window that holds steps.")
        plain, spread, seen = (by_cells(maps, height, width) for maps in found)
        maps = rescaled(spread, plain)
        there = seen.amax(dim=(-2, -1)) >= self.presence
        there[:, 0] = True
        return maps.masked_fill(~there[..., None, None], -1.0).argmax(dim=1).cpu()
