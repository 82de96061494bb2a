"""AttenCraft's masks of concepts, read out of the model's own attention: for training on pictures without masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attnctrl.controls.reading import carried
from attnctrl.stepmaps import SelfMap
from attnctrl.training.losses import RANGE, in_unit_range


def refined(maps: torch.Tensor, own: Sequence[SelfMap], times: int = 4) -> torch.Tensor:
    """Maps sharpened and then spread over what the latents see of each other: in [0, 1], (batch, concepts, tokens).

    AttenCraft (Shentu et al., arXiv 2405.17965): S^times m^2, m the map of a concept brought to [0, 1] by its least and
    largest value, S the self-attention of the same grid; the last of the concepts is to be the background. The paper
    multiplies by the affinity of a mean layer, itself brought to [0, 1]; here each layer of `own` is applied as it is,
    and the results averaged, so that no array is tokens x tokens.
    """
    sharp = in_unit_range(maps, RANGE) ** 2
    return in_unit_range(torch.stack([carried(sharp, layer, times) for layer in own]).mean(dim=0), RANGE)


def assigned(maps: torch.Tensor, threshold: float = 0.1) -> torch.Tensor:
    """The concept of each token: bool (batch, concepts, tokens), where its map exceeds all others by over `threshold`.

    Tokens without such a map belong to nobody. maps: (batch, concepts, tokens), two or more concepts, of `refined`.
    """
    top = maps.topk(2, dim=1).values
    clear = top[:, :1] - top[:, 1:] > threshold
    return clear & (maps == top[:, :1])
