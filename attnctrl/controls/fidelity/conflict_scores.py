"""InitNO's scores of a noise: is every subject attended to, in one place, and apart from the others?"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from attnctrl.sites import Grid
from attnctrl.stepmaps import StepMaps, blur

BINS = 256


def subject_rows(maps: StepMaps, found: torch.Tensor, grid: Grid) -> torch.Tensor:
    """What the pixel with each subject's highest attention attends to in self-attention, blurred.

    found: (batch, subjects, latent tokens) cross-attention -> the same shape. Gradients go through the attention of
    the pixel, not through its choice. Raises ControlError without self-attention on this grid.
    """
    peaks = found.detach().argmax(dim=-1)
    return blur(torch.stack([layer.rows(peaks) for layer in maps.self_layers(grid)]).mean(dim=0), grid)


def overlap(rows: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """S_self: the mean over pairs of subjects of sum min(R_i, R_j) / sum (R_i + R_j), in [0, 0.5]; 0 without pairs.

    rows: (batch, subjects, latent tokens) >= 0; valid: (batch, subjects) bool. -> (batch,).
    """
    first, second = torch.triu_indices(rows.shape[1], rows.shape[1], offset=1, device=rows.device)
    one, two = rows[:, first], rows[:, second]
    pairs = valid[:, first] & valid[:, second]
    shared = torch.minimum(one, two).sum(dim=-1) / ((one + two).sum(dim=-1) + 1e-6)
    return (shared * pairs).sum(dim=-1) / pairs.sum(dim=-1).clamp(min=1)


def otsu(maps: torch.Tensor) -> torch.Tensor:
    """The threshold that parts each map's values best into two classes (Otsu), of 256 levels: (..., n) -> (..., 1)."""
    low, high = maps.amin(dim=-1, keepdim=True), maps.amax(dim=-1, keepdim=True)
    level = ((maps - low) / (high - low).clamp(min=1e-12) * (BINS - 1)).round().long()
    counts = F.one_hot(level, BINS).sum(dim=-2).float()
    below, total = counts.cumsum(dim=-1), counts.sum(dim=-1, keepdim=True)
    first = (counts * torch.arange(BINS, device=maps.device)).cumsum(dim=-1)
    above = total - below
    between = below * above * (first / below.clamp(min=1) - (first[..., -1:] - first) / above.clamp(min=1)) ** 2
    return low + between.argmax(dim=-1, keepdim=True) / (BINS - 1) * (high - low)


def component(mask: torch.Tensor, seed: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The cells of `mask` that are joined to `seed` by edges within the picture: bool (batch, subjects, tokens).

    mask: the same shape; seed: (batch, subjects) position of a cell.
    """
    allowed = mask.reshape(-1, 1, *grid[-2:])
    grown = torch.zeros_like(mask).scatter(-1, seed[..., None], True).reshape(allowed.shape) & allowed
    cross = torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 0.0]], device=mask.device)[None, None]
    while True:
        wider = (F.conv2d(grown.float(), cross, padding=1) > 0) & allowed
        if torch.equal(wider, grown):
            return grown.reshape(mask.shape)
        grown = wider


def scatter(found: torch.Tensor, valid: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The clean loss: summed over subjects, the highest attention apart from the component of the peak.

    That component: what Otsu's threshold leaves of the map and is joined to its peak. The rest counts only where it
    exceeds the component's lowest value. found: (batch, subjects, latent tokens); valid: (batch, subjects); (batch,).
    """
    still = found.detach()
    inside = component(still > otsu(still), still.argmax(dim=-1), grid)
    lowest = still.masked_fill(~inside, float("inf")).amin(dim=-1)
    rest = found.masked_fill(inside, 0.0).amax(dim=-1)
    return (rest * (valid & inside.any(dim=-1) & (rest.detach() > lowest))).sum(dim=-1)
