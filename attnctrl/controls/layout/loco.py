"""LoCo: locally constrained attention, sharpened by self-attention, plus a loss on the special tokens' maps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from attnctrl.control import Control, Descent, Loss, Where, Window, param
from attnctrl.layout import Regions, resolve
from attnctrl.sampling import Sampling
from attnctrl.sites import Step
from attnctrl.stepmaps import StepMaps, phrase_maps


def unit_range(maps: torch.Tensor) -> torch.Tensor:
    """Min-max over the last axis to [0, 1]; constant maps stay as they are."""
    low, high = maps.amin(dim=-1, keepdim=True), maps.amax(dim=-1, keepdim=True)
    span = high - low
    flat = span <= 1e-8
    return torch.where(flat, maps, (maps - low) / span.masked_fill(flat, 1.0))


def local_constraint(maps: torch.Tensor, masks: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """L_LAC = sum over phrases of (1 - sum(A M) / sum(A))^2.

    maps, masks: (batch, regions, latent tokens); valid: (batch, regions) bool. -> (batch,). An empty mask gives 1.
    """
    share = (maps * masks).sum(dim=-1) / maps.sum(dim=-1).clamp(min=1e-8)
    return ((1 - share) ** 2 * valid).sum(dim=-1)


def padding_constraint(
    start: torch.Tensor | None, end: torch.Tensor, union: torch.Tensor, beta: float, squash: bool
) -> torch.Tensor:
    """L_PTC: binary cross-entropy of beta (1 - A_start) + (1 - beta) A_end, min-max normalised, with the foreground.

    start, end: (batch, latent tokens), the start and end tokens' maps, the end's alone counting where there is no start
    token (T5, and the tokens that Qwen keeps); union: (batch, latent tokens) in {0, 1}.
    squash: through a sigmoid as in the paper, whose range 0.5 to 0.73 leaves a floor; else clipped. -> (batch,).
    """
    foreground = unit_range(end if start is None else beta * (1 - start) + (1 - beta) * end)
    foreground = foreground.sigmoid() if squash else foreground.clamp(1e-4, 1 - 1e-4)
    return F.binary_cross_entropy(foreground, union, reduction="none").mean(dim=-1)


@dataclass(frozen=True)
class LoCo(Control):
    """Locally Constrained Training-Free Layout-to-Image Synthesis (Zhao et al., arXiv 2311.12342).

    L = L_LAC + alpha * L_PTC. A phrase's map is the mean over its tokens, multiplied by the self-attention matrix
    (mean over heads and layers; applied by a fused kernel, never built) and min-max normalised. No official code is
    public: beta, alpha and the number of iterations follow descriptions of the paper. `detach_self_attn` stops the
    gradient through the self-attention; the paper leaves it open. `sharpen=False` reads the cross maps alone, which
    is the loss of layout-guidance (arXiv 2304.03373). Described elsewhere with 5 iterations; gamma 60 breaks
    pictures of the shapes world.
    In joint attention the maps are shares of the attention to text, and the self-attention is that of the latents
    among themselves.
    Families: all but SANA, whose self-attention has no maps: there sharpen must be False.
    """

    paper: ClassVar[str] = "arXiv 2311.12342"
    fixes: ClassVar[str] = "objects in the wrong place or melted together, from boxes or masks"

    regions: Regions = ()
    scale: float = param(30.0, "step size gamma", 0, 1000)
    alpha: float = param(0.2, "weight of the special-token loss", 0, 10)
    beta: float = param(0.8, "share of the start token in the special-token map", 0, 1)
    iterations: int = param(3, "descents per step at most", 0, 50)
    enough: float = param(0.0, "stop within a step when the loss per region is below this", 0, 1)
    sharpen: bool = param(True, "multiply the maps by the self-attention")
    detach_self_attn: bool = param(False, "no gradient through the self-attention")
    squash: bool = param(True, "sigmoid before the cross-entropy, as in the paper")
    window: Window = field(default=Window(0.0, 0.4), kw_only=True)
    where: Where = field(default=Where(kinds=("cross", "self", "joint"), near=1 / 16), kw_only=True)

    @property
    def idle(self) -> bool:
        return self.window.empty or self.scale == 0 or self.iterations == 0 or not any(self.regions)

    def begin(self, sampling: Sampling) -> Any:
        layout = resolve(sampling, self.regions, self.where)
        first = [encoders[0] for encoders in sampling.tokens]
        ends = torch.tensor([one.end + one.offset for one in first], device=sampling.device)
        starts = [one.start for one in first if one.start is not None]
        start = torch.tensor(starts, device=sampling.device) if len(starts) == len(first) else None
        images = sampling.images_per_prompt
        return layout, None if start is None else start.repeat_interleave(images), ends.repeat_interleave(images)

    def descent(self, step: Step) -> Descent:
        return Descent(self.scale, self.iterations)

    def loss(self, maps: StepMaps, step: Step, state: Any) -> Loss:
        layout, starts, ends = state
        probs, grid = maps.mean_cross()
        masks = layout.mask(grid)
        phrases = phrase_maps(probs, layout.tokens)
        if self.sharpen:
            spread = phrases.transpose(1, 2)
            layers = maps.self_layers(grid)
            phrases = torch.stack([(m.detached() if self.detach_self_attn else m).apply(spread) for m in layers])
            phrases = phrases.mean(dim=0).transpose(1, 2)
        local = local_constraint(unit_range(phrases), masks, layout.valid)
        value = local
        if self.alpha:
            rows = torch.arange(len(ends), device=ends.device)
            union = (masks.amax(dim=1) > 0).float()
            start = None if starts is None else probs[rows, :, starts]
            value = value + self.alpha * padding_constraint(start, probs[rows, :, ends], union, self.beta, self.squash)
        return Loss(value, local / layout.valid.sum(dim=1).clamp(min=1) < self.enough)
