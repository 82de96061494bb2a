"""What the families with masked text keys and learned variances share, PixArt and SANA."""

from __future__ import annotations

from typing import Any

import torch

from attnctrl.sites import Grid
from attnctrl.text import Text


def patch_grid(sample: torch.Tensor, patch: int) -> Grid:
    """The latent tokens of a sample (batch, channels, height, width)."""
    height, width = sample.shape[-2:]
    return 1, height // patch, width // patch


def pictures_of(output: torch.Tensor, config: Any) -> torch.Tensor:
    """A prediction without the learned variances that some models return as further channels."""
    learned = config.out_channels is not None and config.out_channels // 2 == config.in_channels
    return output.chunk(2, dim=1)[0] if learned else output


def masked_outputs(text: Text, like: tuple) -> tuple:
    """`text` as (positive, its mask, negative, its mask); tokens that a control appended are visible."""
    return text.positive, longer(like[1], text.positive), text.negative, longer(like[3], text.negative)


def longer(mask: torch.Tensor | None, states: torch.Tensor | None) -> torch.Tensor | None:
    """A key mask (batch, tokens) for as many tokens as `states` (batch, tokens, channels) has."""
    if mask is None or states is None or mask.shape[1] >= states.shape[1]:
        return mask
    return torch.cat([mask, mask.new_ones(len(mask), states.shape[1] - mask.shape[1])], dim=1)


def cleaned(pipe: Any, thoroughly: bool, prompt: str) -> str:
    """What these pipelines do to a prompt before they tokenize it: lower case at the least."""
    return str(pipe._text_preprocessing(prompt, clean_caption=thoroughly)[0])
