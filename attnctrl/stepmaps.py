"""The attention maps that a loss reads within one step, differentiable, and the usual ways to prepare them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from attnctrl.errors import ControlError
from attnctrl.kernels import TokenGroups, masked_attention, probabilities
from attnctrl.sites import Grid, Site

# 1-D weights of the 3x3 blur of Attend-and-Excite's code: its kernel is exp(-((x - mu) / (2 * 0.5))^2), a Gaussian of
# standard deviation 0.707, which every later method copied.
BLUR = (0.21194156, 0.57611688, 0.21194156)


@dataclass(frozen=True)
class CrossMap:
    """Cross-attention of one site. probs: (batch, latent tokens, text tokens), averaged over heads.

    What losses get of joint attention are shares of the attention to the prompt: a latent's sum to 1 there too.
    """

    site: Site
    grid: Grid
    probs: torch.Tensor


@dataclass(frozen=True)
class SelfMap:
    """Self-attention of one site, kept as query and key (batch, heads, tokens, head_dim).

    In joint attention, that of the latents among themselves, as if there were no text.
    """

    site: Site
    grid: Grid
    query: torch.Tensor
    key: torch.Tensor
    mask: torch.Tensor | TokenGroups | None
    scale: float

    def apply(self, values: torch.Tensor) -> torch.Tensor:
        """Attention matrix times `values`, averaged over heads, without building the matrix.

        values: (batch, tokens, channels) -> (batch, tokens, channels).
        """
        heads = self.query.shape[1]
        spread = values.to(self.query.dtype)[:, None].expand(-1, heads, -1, -1)
        return masked_attention(self.query, self.key, spread, self.mask, self.scale).float().mean(dim=1)

    def rows(self, positions: torch.Tensor) -> torch.Tensor:
        """What single latent tokens attend to, averaged over heads: no array is tokens x tokens.

        positions: (batch, n) of latent tokens -> (batch, n, tokens).
        """
        heads, size = self.query.shape[1], self.query.shape[-1]
        index = positions[:, None, :, None]
        query = self.query.gather(2, index.expand(-1, heads, -1, size))
        mask = self.mask
        if isinstance(mask, TokenGroups):
            bits = mask.query_bits.expand(len(query), -1).gather(1, positions)
            mask = TokenGroups(bits, mask.key_bits).dense()
        elif mask is not None and mask.shape[-2] > 1:
            mask = mask.expand(len(query), -1, -1, -1).gather(2, index.expand(-1, mask.shape[1], -1, mask.shape[-1]))
        return probabilities(query, self.key, mask, self.scale).mean(dim=1)

    def detached(self) -> SelfMap:
        """The same map without its gradient."""
        return replace(self, query=self.query.detach(), key=self.key.detach())

    def dense(self) -> torch.Tensor:
        """The attention matrix averaged over heads, (batch, tokens, tokens): for coarse grids only."""
        mask = self.mask.dense() if isinstance(self.mask, TokenGroups) else self.mask
        return probabilities(self.query, self.key, mask, self.scale).mean(dim=1)


@dataclass
class StepMaps:
    """What was recorded in one forward pass of the conditional branch, keyed by site so that a repeat is harmless."""

    cross: dict[str, CrossMap] = field(default_factory=dict)
    self_: dict[str, SelfMap] = field(default_factory=dict)

    def only(self, names: set[str]) -> StepMaps:
        """The part of these maps that stems from the sites called `names`."""
        return StepMaps(
            {n: m for n, m in self.cross.items() if n in names},
            {n: m for n, m in self.self_.items() if n in names},
        )

    def shared(self) -> StepMaps:
        """These maps with those of joint attention made shares of the attention to the prompt."""

        def shares(one: CrossMap) -> CrossMap:
            return replace(one, probs=one.probs / one.probs.sum(dim=-1, keepdim=True).clamp(min=1e-8))

        cross = {name: shares(one) if one.site.kind == "joint" else one for name, one in self.cross.items()}
        return StepMaps(cross, self.self_)

    def cross_layers(self) -> list[CrossMap]:
        """The maps of text, at least one: raises ControlError otherwise."""
        if not self.cross:
            raise ControlError("the loss reads maps of text, but `where` selects no cross- or joint-attention site.")
        return list(self.cross.values())

    def self_layers(self, grid: Grid) -> list[SelfMap]:
        """The self-attention maps on `grid`, at least one: raises ControlError otherwise."""
        found = [layer for layer in self.self_.values() if layer.grid == grid]
        if not found:
            raise ControlError(
                f"the loss reads self-attention on the grid {grid}, where `where` selects none: widen it, or switch "
                "that part of the loss off (self_weight=0, background_weight=0, sharpen=False): SANA's has no "
                "maps."
            )
        return found

    def mean_cross(self) -> tuple[torch.Tensor, Grid]:
        """The mean over sites, (batch, latent tokens, text tokens), and its grid: all sites must share one grid."""
        maps = self.cross_layers()
        grids = {m.grid for m in maps}
        if len(grids) > 1:
            raise ControlError(f"maps of several grids {sorted(grids)} cannot be averaged: give Where(near=...).")
        return torch.stack([m.probs for m in maps]).mean(dim=0), maps[0].grid


def phrase_maps(probs: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean map of each phrase over its tokens.

    probs: (batch, latent tokens, text tokens); tokens: (batch, phrases, prompt tokens) bool, where further text may
    follow the prompt -> (batch, phrases, latent tokens); phrases without tokens give zeros.
    """
    share = tokens.to(probs.dtype)
    share = share / share.sum(dim=-1, keepdim=True).clamp(min=1)
    return share @ probs[..., : tokens.shape[-1]].transpose(1, 2)


def token_shares(probs: torch.Tensor, contenders: torch.Tensor, sharpness: float = 100.0) -> torch.Tensor:
    """Attend-and-Excite's preparation: softmax(sharpness * A) over the tokens that compete, 0 for the others.

    probs: (batch, latent tokens, text tokens); contenders: (batch, text tokens) bool. -> the same shape as probs.
    """
    return (probs * sharpness).masked_fill(~contenders[:, None], float("-inf")).softmax(dim=-1)


def blur(maps: torch.Tensor, grid: Grid) -> torch.Tensor:
    """3x3 Gaussian with reflected borders. maps: (batch, phrases, height * width) -> same shape."""
    _, height, width = grid
    pictures = maps.reshape(-1, 1, height, width)
    line = torch.tensor(BLUR, dtype=maps.dtype, device=maps.device)
    # A side of one cell has nothing to reflect.
    mode = "reflect" if min(height, width) > 1 else "replicate"
    padded = F.pad(pictures, (1, 1, 1, 1), mode=mode)
    blurred = F.conv2d(F.conv2d(padded, line.view(1, 1, 3, 1)), line.view(1, 1, 1, 3))
    return blurred.reshape(maps.shape)
