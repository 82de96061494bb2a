"""Losses on what a picture and its references see of each other: `reach` and Leffa's flow field.

A reference is a further row of the batch, or more keys of the same layer: these functions take query and key, each
(batch, heads, tokens, head_dim), wherever they come from, such as two rows of a recorded `SelfMap`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from attnctrl.kernels import masked_attention, probabilities


def reach(query: torch.Tensor, key: torch.Tensor, asked: torch.Tensor, scale: float) -> torch.Tensor:
    """Where in the picture a reference looks: (batch, picture tokens), of sum 1.

    MultiCrafter (arXiv 2509.21953): the attention of the reference's queries to the picture's keys alone, mean over
    heads and over the queries that are asked. query: of the reference; key: of the picture; asked: (batch, reference
    tokens) in [0, 1], how much each token counts. Not the transpose of what the picture sees of the reference.
    """
    rows = probabilities(query, key, None, scale).mean(dim=1)
    asked = asked.to(rows.dtype)
    asked = asked / asked.sum(dim=-1, keepdim=True).clamp(min=1e-8)
    return (asked[:, None] @ rows)[:, 0]


def coordinates(height: int, width: int) -> torch.Tensor:
    """The centres of a grid's cells as (x, y), (-1, -1) for the first and (1, 1) for the last: (height * width, 2)."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return torch.stack([x, y], dim=-1).reshape(-1, 2)


def flow_field(
    query: torch.Tensor, key: torch.Tensor, grid: tuple[int, int], scale: float, temperature: float = 2.0
) -> torch.Tensor:
    """Where on the reference each token of the picture looks, on average: (batch, picture tokens, 2) as (x, y).

    Leffa (Zhou et al., arXiv 2412.08486): softmax(Q K^T * scale / temperature) over the reference's keys alone, mean
    over heads, times the keys' coordinates in [-1, 1]. query: of the picture; key: of the reference, on grid (height,
    width). The coordinates are the values of one attention, so that no array is tokens x tokens.
    """
    places = coordinates(*grid).to(query)
    values = places.expand(*key.shape[:2], -1, -1)
    return masked_attention(query, key, values, None, scale / temperature).float().mean(dim=1)


def warped(reference: torch.Tensor, flow: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The reference as the flow sees it: (batch, channels, height, width).

    reference: (batch, channels, rows, columns); flow: (batch, h, w, 2), enlarged bilinearly. The corners of a grid are
    its outermost centres, in the flow, its enlargement and the picture: the identity stays the identity at every size.
    """
    larger = F.interpolate(flow.permute(0, 3, 1, 2), size=(height, width), mode="bilinear", align_corners=True)
    return F.grid_sample(reference, larger.permute(0, 2, 3, 1), padding_mode="border", align_corners=True)


def flow_loss(
    flow: torch.Tensor, target: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor, late: torch.Tensor | None
) -> torch.Tensor:
    """Mean square difference of the picture and the warped reference inside the mask: (batch,), Leffa's loss.

    flow: (batch, h, w, 2); target: (batch, channels, height, width), with values of any one scale; mask: (batch,
    height, width) in [0, 1]. late: (batch,) bool, which samples have little enough noise for it (timestep < 500 of
    1000, says the paper); the others get 0. Weight 1e-3 for a sum over the layers; whether the paper's loss averages
    over pixels is not known, and the mean is taken here.
    """
    height, width = target.shape[-2:]
    error = ((warped(reference, flow, height, width) - target) ** 2).mean(dim=1) * mask
    loss = error.sum((1, 2)) / mask.sum((1, 2)).clamp(min=1e-8)
    return loss if late is None else loss * late
