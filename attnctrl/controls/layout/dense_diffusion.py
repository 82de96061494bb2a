"""DenseDiffusion: attention logits moved toward the row's maximum inside a region, toward its minimum outside."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from attnctrl.control import Control, Where, Window, param
from attnctrl.layout import Regions, per_prompt, resolve
from attnctrl.sampling import Sampling
from attnctrl.sites import Call
from attnctrl.text import Text


def modulated(
    scores: torch.Tensor, inside: torch.Tensor, strength: torch.Tensor, touched: torch.Tensor | None = None
) -> torch.Tensor:
    """s + k (max - s) inside, s - k (s - min) outside, with k = strength (DenseDiffusion eq. 4-6, code form).

    scores: (batch, heads, queries, keys); inside: (batch, 1, queries, keys) bool; strength: (batch, 1, queries, 1);
    touched: keys that may be changed, broadcastable bool, None for all. Masked scores (-inf) stay masked.
    """
    hidden = torch.isinf(scores)
    high = scores.masked_fill(hidden, float("-inf")).amax(dim=-1, keepdim=True)
    low = scores.masked_fill(hidden, float("inf")).amin(dim=-1, keepdim=True)
    moved = scores + strength * (torch.where(inside, high, low) - scores)
    changed = ~hidden if touched is None else ~hidden & touched
    return torch.where(changed, moved, scores)


def decay(noise: float, power: float) -> float:
    """The paper's (t / T)^power: noise is the timestep as a fraction of the training schedule."""
    return float(noise) ** power


def alike(tokens: tuple[int, ...], count: int) -> list[int]:
    """`count` of the tokens in order: all, unless a tokenizer splits a phrase otherwise where it stands alone."""
    return [tokens[i * len(tokens) // count] for i in range(count)]


@dataclass(frozen=True)
class DenseDiffusion(Control):
    """Dense Text-to-Image Generation with Attention Modulation (Kim et al., ICCV 2023, arXiv 2308.12964).

    In cross-attention, a pixel's logits move toward the row maximum for the words of its region and toward the
    minimum for the others; in self-attention, toward pixels of the same region and away from the rest; by
    weight * (1 - size_adaptation * area) * (t / T)^power. The area term is per pixel, as in the official code. The
    embedding of each phrase is replaced by that of the phrase encoded alone, so that words do not leak through the
    text encoder. `free_tokens`: the code also pushes down words of no region and special tokens ("push"); it expects
    a background region that covers the rest. "keep" leaves them alone, which pictures with uncovered pixels need.
    The paper's power 5 is over after the first steps and hardly moves an object of the shapes world: the default is 1.
    In joint attention, which the paper does not treat, the logits of latents for the prompt and those of latents among
    themselves are moved apart, each with its own maximum and minimum; the rows of text stay as they are. That
    materialises all scores: (batch, heads, tokens, tokens) in float32.
    Families: all (SDXL: weak, its pooled text bypasses cross-attention).
    """

    paper: ClassVar[str] = "arXiv 2308.12964"
    fixes: ClassVar[str] = "objects in the wrong place, from free-form masks, without gradients"

    regions: Regions = ()
    cross_weight: float = param(1.0, "strength in cross-attention, w_c", 0, 4)
    self_weight: float = param(0.3, "strength in self-attention, w_s", 0, 4)
    size_adaptation: float = param(1.0, "how much larger regions are pushed less", 0, 1)
    power: float = param(1.0, "decay with the timestep; 5 in the paper", 0, 10)
    free_tokens: str = param("keep", "words of no region and special tokens", choices=("keep", "push"))
    swap_phrases: bool = param(True, "encode each phrase alone")
    window: Window = field(default=Window(0.0, 0.3), kw_only=True)
    where: Where = field(default=Where(kinds=("cross", "self", "joint")), kw_only=True)

    @property
    def idle(self) -> bool:
        return self.window.empty or not any(self.regions) or (self.cross_weight == 0 and self.self_weight == 0)

    def context(self, text: Text, sampling: Sampling) -> Text:
        if not self.swap_phrases:
            return text
        positive = text.positive.clone()
        for p, regions in enumerate(per_prompt(self.regions, sampling.prompt_count)):
            rows = slice(p * sampling.images_per_prompt, (p + 1) * sampling.images_per_prompt)
            phrases = [r.phrase for r in regions]
            encoded = sampling.encode(phrases).positive if regions else ()
            for region, alone, tokens in zip(regions, encoded, sampling.read(phrases), strict=True):
                found = sampling.find(region.phrase, p, region.occurrence)
                for encoder, single in zip(sampling.tokens[p], tokens, strict=True):
                    source, *_ = single.occurrences(region.phrase)
                    # Several places share one encoding.
                    for place in encoder.occurrences(region.phrase):
                        if set(place) <= set(found):
                            positive[rows, list(place)] = alone[alike(source, len(place))].to(positive)
        return text.change(positive=positive)

    def begin(self, sampling: Sampling) -> Any:
        layout = resolve(sampling, self.regions, self.where)
        state = {}
        for grid in sampling.grids(self.where):
            masks = layout.mask(grid)
            words = torch.einsum("brt,brn->bnt", layout.tokens.float(), masks) > 0
            same = torch.einsum("brn,brm->bnm", masks, masks) > 0
            area = same.float().mean(dim=-1, keepdim=True)
            push = 1 - self.size_adaptation * area
            # A pixel of no region belongs to no segment: its self-attention is left alone.
            covered = same.any(dim=-1, keepdim=True)
            bound = layout.tokens.any(dim=1)[:, None, None]
            state[grid] = (*(t[:, None] for t in (words, same, push, covered)), bound)
        return state

    def scores(self, scores: torch.Tensor, call: Call, state: Any) -> torch.Tensor:
        words, same, push, covered, bound = state[call.queries.grid]
        tau = decay(call.step.noise, self.power)
        among = (same, push * (self.self_weight * tau), covered if self.free_tokens == "keep" else None)
        of_text = (words, push * (self.cross_weight * tau), bound if self.free_tokens == "keep" else None)
        rows, first = call.queries.latent, call.keys.text.start
        text = slice(first, first + words.shape[-1])
        blocks = {"self": [(rows, among)], "cross": [(text, of_text)], "joint": [(rows, among), (text, of_text)]}
        moved = scores.clone()
        for columns, how in blocks[call.site.kind]:
            moved[:, :, rows, columns] = modulated(scores[:, :, rows, columns], *how)
        return moved
