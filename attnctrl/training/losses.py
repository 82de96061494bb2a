"""Losses on attention for training: where a subject's words, or its reference, look, against where the subject is.

Pure functions of recorded maps. maps: (batch, subjects, tokens), what each latent token gives to each subject, such as
`stepmaps.phrase_maps` makes them; masks: the same shape, in [0, 1], how much of each token the subject covers. present:
(batch, subjects) bool, which of the subjects a picture has (None: all); the others count for nothing, whatever their
maps and masks hold. Every loss is one number for each picture, (batch,).
"""

from __future__ import annotations

import math

import torch

EPS = 1e-5
PEAK, RANGE = "peak", "range"


def localisation(
    maps: torch.Tensor,
    masks: torch.Tensor,
    present: torch.Tensor | None = None,
    *,
    normalise: bool = False,
    peaks: bool = False,
) -> torch.Tensor:
    """Mean attention outside of a subject less that inside, mean over the subjects: in about [-1, 1], best at -1.

    FastComposer (Xiao et al., arXiv 2305.10431, sec. 4.2): the balanced L1 loss on the probabilities of
    cross-attention, weight 1e-3. It is linear, so that maps which are means over heads give the mean over heads of
    the loss. normalise: each map is divided by its maximum first: ConsistentID's facial attention localisation (Huang
    et al., arXiv 2404.16771), weight 0.01. Its code does so head by head and, other than the paper, on self-attention.
    peaks: the maxima outside and inside in place of the means: DreamText's loss on characters (arXiv 2405.14701),
    weight 0.01; a token belongs to the side that covers more of it; a side without tokens has the maximum 0.
    """
    if normalise:
        maps = in_unit_range(maps, PEAK)
    if peaks:
        inside = masks > 0.5
        apart = _largest(maps, ~inside) - _largest(maps, inside)
    else:
        outside = 1 - masks
        apart = (maps * outside).sum(-1) / (outside.sum(-1) + EPS) - (maps * masks).sum(-1) / (masks.sum(-1) + EPS)
    return mean_over(apart, present)


def region_mse(
    maps: torch.Tensor,
    masks: torch.Tensor,
    present: torch.Tensor | None = None,
    *,
    rest: torch.Tensor | None = None,
    covered_only: bool = False,
) -> torch.Tensor:
    """Mean square difference of shares of attention and masks, summed over the subjects and divided by their number.

    maps: shares, as `group_shares` makes them: the attention to the subjects (and the rest) alone, of sum 1.
    rest: (batch, tokens), the share of the background's tokens; its mask is what no subject covers. With it this is
    StoryMaker's loss (arXiv 2409.12576), weight 0.1: such tokens are the place for attention that belongs to nobody.
    Without it, AnyDressing's localisation of garments (arXiv 2412.04146, sec. 4; its weight is not published). Where
    the shares of the subjects alone sum to 1 they cannot all be 0 in the background, so that loss has a floor there:
    covered_only averages over the tokens by how much of them the subjects cover.
    """
    kept = torch.ones_like(masks[:, :, 0], dtype=torch.bool) if present is None else present
    masks = masks * kept[..., None]
    covered = masks.sum(1).clamp(0, 1)
    weights = covered if covered_only else torch.ones_like(covered)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=EPS)
    errors = (((maps - masks) ** 2) * weights[:, None]).sum(-1) * kept
    total = errors.sum(-1)
    if rest is not None:
        total = total + (((rest - (1 - covered)) ** 2) * weights).sum(-1)
    return total / kept.sum(-1).clamp(min=1)


def divergence(
    maps: torch.Tensor, masks: torch.Tensor, present: torch.Tensor | None = None, *, temperature: float = 1.0
) -> torch.Tensor:
    """Jensen-Shannon divergence of softmax(map) and softmax(mask) over the tokens, mean over the subjects: [0, ln 2].

    AttenCraft's loss on concepts (Shentu et al., arXiv 2405.17965), weight 1, where the background is one of the
    concepts. Maps are brought to [0, 1] by their least and largest values. A softmax of values in [0, 1] is flat: two
    masks of complementary halves are 0.111 apart, whatever their size; a lower temperature makes it steeper.
    """
    logs = [(one / temperature).log_softmax(dim=-1) for one in (in_unit_range(maps, RANGE), masks.to(maps.dtype))]
    middle = torch.logaddexp(*logs) - math.log(2)
    parts = [(one.exp() * (one - middle)).sum(-1) for one in logs]
    return mean_over((parts[0] + parts[1]) / 2, present)


def dice(
    maps: torch.Tensor, masks: torch.Tensor, present: torch.Tensor | None = None, *, eps: float = EPS
) -> torch.Tensor:
    """1 - Dice coefficient of a map in [0, 1] and the mask, summed over the subjects: MultiCrafter's L_attn.

    MultiCrafter (arXiv 2509.21953) supervises by it where each reference looks in the picture: `reach`, brought to
    [0, 1] by `in_unit_range`; its weight is not published. Subjects whose mask is empty count for nothing.
    """
    both = 2 * (maps * masks).sum(-1) + eps
    values = 1 - both / (maps.sum(-1) + masks.sum(-1) + eps)
    kept = masks.sum(-1) > 0
    return (values * (kept if present is None else kept & present)).sum(-1)


# preparing maps -------------------------------------------------------------------------------------------------
def in_unit_range(maps: torch.Tensor, how: str) -> torch.Tensor:
    """Each map (..., tokens) divided by its maximum ("peak"), or also shifted so that its minimum is 0 ("range").

    The gradient takes the extremes into account. A flat map of "range" becomes 0.
    """
    if how == RANGE:
        maps = maps - maps.amin(dim=-1, keepdim=True)
    return maps / (maps.amax(dim=-1, keepdim=True) + EPS)


def group_shares(probs: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """What each group of text tokens gets of a latent's attention to all of them: (batch, groups, latent tokens).

    probs: (batch, latent tokens, text tokens); groups: (batch, groups, text tokens) bool, disjoint. They sum to 1 over
    the groups, as probabilities of a softmax over their tokens alone would. (StoryMaker's and AnyDressing's references
    have a softmax of their own; for words of a prompt this is the same of the words' columns.)
    """
    sums = groups.to(probs.dtype) @ probs.transpose(1, 2)
    return sums / sums.sum(dim=1, keepdim=True).clamp(min=1e-12)


def mean_over(values: torch.Tensor, present: torch.Tensor | None) -> torch.Tensor:
    """The mean of (batch, subjects) over those that are present, (batch,); 0 where none is."""
    if present is None:
        return values.mean(dim=-1)
    return torch.where(present, values, 0.0).sum(dim=-1) / present.sum(dim=-1).clamp(min=1)


def _largest(maps: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """The maximum over the tokens that are meant, 0 where none is. Attention is never below 0."""
    return (maps * among).amax(dim=-1)
