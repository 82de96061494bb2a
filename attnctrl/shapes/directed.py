"""Heads of the video transformer that look ahead in time, and heads that look back, from the start of its training.

Rotary positions tell attention how far two frames are apart and never a frame's own time. The two ways of an axis
can then be told apart only by a head that prefers later frames, or earlier ones, and whose queries the text tilts to
one side. Where a training begins with neither, neither alone is of use: in 5700 steps neither was learned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

AHEAD, BACK = 0, 1
"""The heads, of every layer but the first."""

STRENGTH = 4.1
"""Norm weight of their queries and keys in time: in heads of width 32 the logits of frames d later begin as
4.1^2 / sqrt(32) sin(0.215 d), which is 2.3 at 4 frames."""

TILT = 3.0
"""Norm weight of their constant keys in height and width, on which text tilts the queries."""


def direct_heads(transformer: WanTransformer3DModel) -> None:
    """Give heads 0 and 1 of every layer but the first their directions, in place, and hold them there.

    In the second rotary pair of time their queries and keys are constant, in the first of height and of width their
    keys; these rows have no gradients any more. All else is free.
    """
    width = transformer.config.attention_head_dim
    side = 2 * (width // 6)
    spatial = width - 2 * side, width - side
    for block in transformer.blocks[1:]:
        queries = _Projection(block.attn1.to_q, block.attn1.norm_q)
        keys = _Projection(block.attn1.to_k, block.attn1.norm_k)
        for head, way in ((AHEAD, 1.0), (BACK, -1.0)):
            start = width * head
            queries.hold(start + 2, (0.0, way), STRENGTH)
            keys.hold(start + 2, (1.0, 0.0), STRENGTH)
            for pair in (start + first for first in spatial):
                keys.hold(pair, (1.0, 0.0), TILT)
                queries.scale(pair, TILT)


@dataclass(frozen=True)
class _Projection:
    """A linear layer to queries or keys and the norm behind it, which divides by one number for all heads."""

    linear: nn.Linear
    norm: nn.RMSNorm

    @torch.no_grad()
    def hold(self, start: int, bias: tuple[float, float], weight: float) -> None:
        """Make a pair of outputs constant, for good."""
        rows = slice(start, start + 2)
        self.linear.weight[rows] = 0
        self.linear.bias[rows] = torch.tensor(bias, device=self.linear.bias.device)
        self.norm.weight[rows] = weight
        for parameter in (self.linear.weight, self.linear.bias, self.norm.weight):
            parameter.register_hook(_without(rows))

    @torch.no_grad()
    def scale(self, start: int, weight: float) -> None:
        """Move a factor of a pair of outputs from the matrix to the norm: it learns that much faster."""
        rows = slice(start, start + 2)
        self.linear.weight[rows] /= weight
        self.norm.weight[rows] = weight


def _without(rows: slice) -> Callable[[Tensor], Tensor]:
    """A hook of a parameter: its gradient with zeros in some rows."""

    def hook(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[rows] = 0
        return gradient

    return hook
