"""Focus on Your Instruction: every instruction acts where the attention says that it belongs, and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from attnctrl.control import Control, Where, param
from attnctrl.controls.editing.found import given, on_grid, resized
from attnctrl.controls.guidance.common import selected
from attnctrl.controls.layout.dense_diffusion import decay, modulated
from attnctrl.errors import ControlError
from attnctrl.guidance import Prediction
from attnctrl.kernels import probabilities
from attnctrl.sampling import Sampling
from attnctrl.sites import Call, Grid, Site, Step, Stream
from attnctrl.stepmaps import blur, phrase_maps


def sharpened(maps: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Maps squared, which weakens the background, blurred and min-max normalised: (batch, n, tokens), 0..1.

    A map that is the same everywhere gives zeros.
    """
    smooth = blur(maps.square(), grid)
    low, high = smooth.amin(dim=-1, keepdim=True), smooth.amax(dim=-1, keepdim=True)
    return (smooth - low) / (high - low).clamp(min=1e-12)


def binary(maps: torch.Tensor, threshold: float, grow: int) -> torch.Tensor:
    """Where maps (batch, n, height, width) exceed the threshold, and `grow` pixels around."""
    inside = (maps > threshold).float()
    return F.max_pool2d(inside, 2 * grow + 1, stride=1, padding=grow) > 0


def mixed(predictions: Sequence[torch.Tensor], masks: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """Each prediction inside its mask, their mean where masks overlap, and `rest` outside of all.

    predictions: of the shape of `rest`, (batch, channels, height, width). masks: bool (batch, n, height, width).
    """
    total = sum((masks[:, i : i + 1] * one for i, one in enumerate(predictions)), torch.zeros_like(rest))
    count = masks.sum(dim=1, keepdim=True)
    return torch.where(count > 0, total / count.clamp(min=1), rest)


@dataclass
class State:
    """keywords, spans: bool (pictures, instructions, text tokens), of the keywords and of all words. nothing: the
    embedding of no text. alone: of each instruction alone, (pictures, tokens, channels). read: the sites whose maps
    are kept. maps: by step and site, (pictures, instructions, tokens). masks: bool (pictures, instructions, height,
    width) of the latents, once they are known.
    """

    latents: Grid
    keywords: torch.Tensor
    spans: torch.Tensor
    nothing: torch.Tensor
    alone: list[torch.Tensor]
    read: dict[str, Grid]
    maps: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    masks: torch.Tensor | None = None


@dataclass(frozen=True)
class FocusOnInstruction(Control):
    """Focus on Your Instruction (Guo et al., CVPR 2024, arXiv 2312.10113): several instructions in one picture.

    phrases: for each instruction the words of the prompt that say where, "red circle" of "red circle to blue".
    instructions: all its words as they stand in the prompt; with one phrase, by default the whole prompt. Both are
    the same for every prompt of the batch.

    Until `read_until` the maps of the phrases are read, in the layers nearest to the share `read_share` of the latents'
    tokens, and averaged over heads, layers and steps. Squared, blurred, min-max normalised and cut at `threshold` they
    are the masks; `masks`, one for each instruction, take their place. From then on two things can be done:

    - `modulate`: in cross-attention a latent inside a mask has the logits of its instruction's words moved toward the
      row's maximum and those of other instructions toward the minimum, by strength * (t / T)^power; a latent outside
      of all masks attends to no text instead of the prompt.
    - `disentangle`: guidance by the text acts inside the masks alone; outside, only guidance by the picture is left.
      With `separate` each mask has a prediction for its instruction alone: one more for each, without other controls.

    The official code was never published, and the paper's settings are not known here: these are ours, and so are
    that masks are found during the run, at the latents' grid, and that the attention to no text is that of the pixel's
    own query. Special tokens and padding keep their logits. Only the conditional branch's attention is touched.
    Families: UNets; meant for InstructPix2Pix. On others outside the masks is the unconditional prediction.
    """

    paper: ClassVar[str] = "arXiv 2312.10113"
    fixes: ClassVar[str] = "instructions that change more than they speak of, or each other's objects"

    where: Where = field(default=Where(kinds=("cross",)), kw_only=True)
    phrases: Sequence[str] = ()
    instructions: Sequence[str] = ()
    masks: Sequence[Any] | None = field(default=None, compare=False)
    modulate: bool = param(True, "cross-attention of each instruction inside its mask only")
    disentangle: bool = param(True, "guidance by the text inside the masks only")
    separate: bool = param(False, "a prediction for each instruction alone")
    strength: float = param(0.3, "how far logits move, at pure noise", 0, 1)
    power: float = param(1.0, "decay of the strength with the timestep", 0, 10)
    read_until: float = param(0.2, "part of the run in which the maps are read", 0.01, 1)
    read_share: float = param(1 / 16, "tokens of the layers that are read, as a share of the latents'", 0.001, 1)
    threshold: float = param(0.4, "of the normalised map, above which a latent is inside", 0, 1)
    grow: int = param(1, "latents by which a mask is grown", 0, 64)

    @property
    def idle(self) -> bool:
        return self.window.empty or not any(self.phrases) or not (self.modulate or self.disentangle)

    def points(self) -> tuple[str, ...]:
        used = {"scores": self.modulate and self.strength > 0, "guide": self.disentangle}
        return tuple(p for p in super().points() if used.get(p, True))

    def acts(self, step: Step, branch: str, state: State) -> bool:
        return super().acts(step, branch, state) and (state.masks is None or self.modulate)

    def sites(self, sampling: Sampling) -> list[Site]:
        return replace(self.where, kinds=("cross",)).select(sampling.sites, sampling.latent_grid)

    def begin(self, sampling: Sampling) -> State:
        told = self._told(sampling)
        marked = torch.zeros(2, sampling.prompt_count, len(self.phrases), sampling.text_tokens, dtype=torch.bool)
        for rows, texts in zip(marked, (self.phrases, told), strict=True):
            for p in range(sampling.prompt_count):
                for i, text in enumerate(texts):
                    words = _words(sampling, p) if text is None else sampling.find(text, p)
                    rows[p, i, list(words)] = True
        images = sampling.images_per_prompt
        keywords, spans = marked.repeat_interleave(images, dim=1).to(sampling.device)
        near = replace(self.where, kinds=("cross",), near=self.read_share)
        read = {site.name: site.grid(sampling.latent_grid) for site in selected(self, sampling, near)}
        nothing = sampling.encode([""]).positive.to(sampling.device, sampling.dtype)
        alone = []
        if self.separate:
            whole = list(sampling.prompts or [])
            wholes = [whole if text is None else [text] * sampling.prompt_count for text in told]
            alone = [sampling.encode(texts).positive.repeat_interleave(images, dim=0) for texts in wholes]
        state = State(sampling.latent_grid, keywords, spans, nothing, alone, read)
        if self.masks is not None:
            state.masks = given(self.masks, sampling)
        return state

    def _told(self, sampling: Sampling) -> list[str | None]:
        """The words of each instruction, None for the whole prompt. Raises ControlError for numbers that differ."""
        if self.masks is not None and len(self.masks) != len(self.phrases):
            raise ControlError(
                f"FocusOnInstruction has {len(self.masks)} masks for {len(self.phrases)} phrases: give one for each."
            )
        if not self.instructions and len(self.phrases) == 1:
            return [None]
        if len(self.instructions) != len(self.phrases):
            raise ControlError(
                f"FocusOnInstruction has {len(self.phrases)} phrases and {len(self.instructions)} instructions: give "
                "for each instruction its words and the phrase among them that says where."
            )
        return list(self.instructions)

    def _masks(self, step: Step, state: State) -> torch.Tensor | None:
        """The masks, which are made once in the first step that comes after enough others."""
        earlier = [maps for (at, _), maps in state.maps.items() if at < step.index]
        if state.masks is None and step.progress >= self.read_until and earlier:
            means, grid = torch.stack(earlier).mean(dim=0), next(iter(state.read.values()))
            flat = means.amax(dim=-1) == means.amin(dim=-1)
            if bool(flat.any()):
                which = int(flat.any(dim=0).nonzero()[0])
                raise ControlError(
                    f'FocusOnInstruction: the map of "{self.phrases[which]}" is the same everywhere, so it shows no '
                    "place: name other words of the instruction, or give masks."
                )
            maps = resized(sharpened(means, grid), grid, state.latents)
            state.masks = binary(maps, self.threshold, self.grow)
            state.maps.clear()
        return state.masks

    def inputs(self, call: Call, state: State) -> Call:
        masks = self._masks(call.step, state)
        if masks is None:
            if call.site.name in state.read:
                probs = probabilities(call.query, call.key, call.mask, call.scale).mean(dim=1)
                state.maps[call.step.index, call.site.name] = phrase_maps(probs, state.keywords)
            return call
        assert call.project is not None
        assert call.queries.grid is not None
        inside = on_grid(masks, call.queries.grid).any(dim=1)[:, None, :, None].to(call.value.dtype)
        key, value = call.project(state.nothing.expand(len(call.query), -1, -1))
        return call.shared(inside, Stream(key, value, 1 - inside))

    def scores(self, scores: torch.Tensor, call: Call, state: State) -> torch.Tensor:
        if state.masks is None:
            return scores
        assert call.queries.grid is not None
        inside = on_grid(state.masks, call.queries.grid)
        own = torch.einsum("biq,bit->bqt", inside.float(), state.spans.float())[:, None] > 0
        told = state.spans.any(dim=1)[:, None, None]
        strength = torch.tensor(self.strength * decay(call.step.noise, self.power), device=scores.device)
        return modulated(scores, own, strength, told)

    def guide(self, prediction: Prediction, step: Step, state: State) -> torch.Tensor:
        textless, masks = prediction.textless, self._masks(step, state)
        if textless is None:
            raise ControlError(
                "FocusOnInstruction confines guidance by the text, which is off: raise guidance_scale above 1, or set "
                "disentangle=False."
            )
        if masks is None:
            return prediction.combined
        if not state.alone:
            return torch.where(masks.any(dim=1, keepdim=True), prediction.combined, prediction.guided(textless))
        own = [prediction.again(text.to(textless.dtype)) for text in state.alone]
        return prediction.guided(mixed(own, masks, textless))


def _words(sampling: Sampling, prompt: int) -> list[int]:
    """Where the words of a prompt stand, without special tokens and what the encoder's window cuts off."""
    return [
        i + tokens.offset
        for tokens in sampling.tokens[prompt]
        for i, (a, b) in enumerate(tokens.spans[: tokens.limit - 1])
        if a < b
    ]
