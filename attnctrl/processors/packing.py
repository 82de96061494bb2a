"""Latents packed into tokens: (batch, tokens, channels) to pictures and back."""

from __future__ import annotations

import torch

from attnctrl.sites import Grid


def pictures_of_blocks(tokens: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Tokens of 2x2 latents each, (batch, height * width, channels * 4), as (batch, channels, 2 height, 2 width)."""
    blocks = tokens.unflatten(1, grid[1:]).unflatten(-1, (-1, 2, 2))
    return blocks.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def blocks_of_pictures(latents: torch.Tensor) -> torch.Tensor:
    """The reverse of `pictures_of_blocks`."""
    blocks = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
    return blocks.permute(0, 2, 4, 1, 3, 5).flatten(3, 5).flatten(1, 2)


def cropped(tokens: torch.Tensor, grid: Grid, rows: slice, columns: slice) -> torch.Tensor:
    """The part (batch, tokens, channels) of tokens in these rows and columns; what follows the grid's tokens stays."""
    count = grid[1] * grid[2]
    part = tokens[:, :count].unflatten(1, grid[1:])[:, rows, columns].flatten(1, 2)
    return torch.cat([part, tokens[:, count:]], dim=1)


def own_grid(ids: torch.Tensor) -> Grid:
    """The grid of the picture from position ids (..., tokens, axes) of (reference number, row, column, ...).

    The picture is reference number 0; the ids of a batch are alike.
    """
    ids = ids[0] if ids.ndim == 3 else ids
    own = ids[ids[:, 0] == 0].float()
    height, width = (own.amax(dim=0)[1:3] + 1).int().tolist()
    return 1, height, width
