"""Self-attention guidance: away from the prediction for a picture blurred where the model looks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F

from attnctrl.control import Control, Where, param
from attnctrl.controls.guidance.common import OWN, middle, selected
from attnctrl.guidance import Prediction
from attnctrl.kernels import probabilities
from attnctrl.sampling import Sampling
from attnctrl.sites import Call, Grid, Site, Step

PAIRS = 2**20
"""How many pairs of query and key are looked at together."""


def received(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """The attention that each key gets from all queries, mean over heads, relative to the mean key: (batch, keys).

    query, key: (batch, heads, tokens, head_dim); mask: broadcastable to (batch, heads, queries, keys). Rows of the map
    are made a few at a time, and their sum is kept.
    """
    rows = max(1, PAIRS // key.shape[2])
    total = torch.zeros(query.shape[0], key.shape[2], device=query.device)
    for start in range(0, query.shape[2], rows):
        some = slice(start, start + rows)
        own = mask if mask is None or mask.shape[-2] == 1 else mask[..., some, :]
        total += probabilities(query[:, :, some], key, own, scale).mean(dim=1).sum(dim=1)
    return total / total.mean(dim=-1, keepdim=True)


def blurred(pictures: torch.Tensor, size: int, sigma: float) -> torch.Tensor:
    """Gaussian blur of (..., height, width) with a kernel of `size` x `size` and reflected borders.

    sigma: in latent pixels. The kernel ends where a small picture has nothing more to reflect.
    """
    height, width = pictures.shape[-2:]
    flat = pictures.reshape(-1, 1, height, width)
    for axis, length in ((-2, height), (-1, width)):
        reach = min(size // 2, length - 1)
        at = torch.arange(-reach, reach + 1, dtype=flat.dtype, device=flat.device)
        line = (-0.5 * (at / sigma) ** 2).exp()
        line = line / line.sum()
        pad, form = ((reach, reach, 0, 0), (1, 1, 1, -1)) if axis == -1 else ((0, 0, reach, reach), (1, 1, -1, 1))
        flat = F.conv2d(F.pad(flat, pad, mode="reflect"), line.view(form))
    return flat.reshape(pictures.shape)


def degradation(
    clean: torch.Tensor, mass: torch.Tensor, grid: Grid, threshold: float, size: int, sigma: float
) -> torch.Tensor:
    """What blurring the attended parts changes in the picture, of the shape of `clean`.

    clean: (batch, channels, height, width), frames before height for video. mass: (batch, tokens of `grid`), mean 1;
    parts above `threshold` are blurred.
    """
    # Uniform attention must leave nothing above its own mean, rounding included.
    parts = (mass > threshold * (1 + 1e-5)).to(clean.dtype).reshape(-1, 1, *grid)
    frames = clean if clean.ndim == 5 else clean[:, :, None]
    inside = F.interpolate(parts, size=frames.shape[-3:], mode="nearest")
    return (inside * (blurred(frames, size, sigma) - frames)).reshape(clean.shape)


@dataclass
class State:
    """Of each guidance branch, the attention that tokens got in this step, and their grid."""

    sites: list[Site]
    read: dict[str, tuple[torch.Tensor, Grid]] = field(default_factory=dict)


@dataclass(frozen=True)
class SelfAttentionGuidance(Control):
    """Self-attention guidance (Hong et al., ICCV 2023, arXiv 2210.00939); no prompt is needed.

    From the prediction e without the prompt (the only one, without classifier-free guidance) follows the clean picture.
    Where its tokens get more than `threshold` times the mean attention at one layer, it is blurred and noised anew with
    the noise of e; the denoiser's prediction for that is e_b, and what the pipeline combined gets `scale` * (e - e_b).
    All other controls act in e_b as they do in e.

    The layer is the first one of the middle block (as in the code for Stable Diffusion), in transformers the one in the
    middle; `where` narrows what is to choose from. In joint attention the attention of the latents among themselves
    counts. Departures from diffusers' pipeline: any scheduler and prediction type, rectified flow included, for the
    noise is left in the denoiser's input instead of put back; any size; the input stays scaled.
    Families: all; of layers with linear attention (SANA) only those that are sites.
    """

    paper: ClassVar[str] = "arXiv 2210.00939"
    fixes: ClassVar[str] = "blurred, incoherent pictures; without a prompt too"

    scale: float = param(0.75, "weight of the difference that is added", 0, 100)
    threshold: float = param(1.0, "attention above which a token is blurred, relative to the mean token", 0, 1000)
    kernel: int = param(9, "side of the blur's kernel in latent pixels; even numbers count as the next odd one", 3, 127)
    sigma: float = param(1.0, "standard deviation of the blur in latent pixels", 0.01, 100)
    where: Where = field(default=Where(kinds=OWN), kw_only=True)
    branches: tuple[str, ...] = field(default=("cond", "uncond"), kw_only=True)

    @property
    def idle(self) -> bool:
        return self.window.empty or self.scale == 0

    def begin(self, sampling: Sampling) -> State:
        sites = middle(selected(self, sampling, self.where))
        return State([next(s for s in sites if s.expert == e) for e in sorted({s.expert for s in sites})])

    def sites(self, sampling: Sampling) -> list[Site]:
        return self.begin(sampling).sites

    def inputs(self, call: Call, state: State) -> Call:
        seen, made, grid = call.keys.latent, call.queries.latent, call.queries.grid
        assert grid is not None
        # A mask of joint attention speaks of the text's padding.
        mask = call.mask if call.site.kind == "self" else None
        mass = received(call.query[:, :, made], call.key[:, :, seen], mask, call.scale)
        state.read[call.branch] = mass, grid
        return call

    def guide(self, prediction: Prediction, step: Step, state: State) -> torch.Tensor:
        branch = "cond" if prediction.uncond is None else "uncond"
        free = prediction.own if prediction.uncond is None else prediction.uncond
        mass, grid = state.read[branch]
        change = degradation(prediction.clean(free), mass, grid, self.threshold, self.kernel, self.sigma)
        degraded = prediction.again(branch=branch, controlled=True, clean_change=change)
        return prediction.combined + self.scale * (free - degraded)
