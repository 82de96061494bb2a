"""What the methods share that learn embeddings from one picture and read maps with them in another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attnctrl.control import Control
from attnctrl.errors import ControlError
from attnctrl.sampling import Sampling
from attnctrl.stepmaps import CrossMap

if TYPE_CHECKING:
    from attnctrl.run import Run


def first_word(sampling: Sampling, who: str) -> int:
    """The place of the prompt's first token that is no start token. Raises ControlError where there is no prompt."""
    if sampling.prompts is None:
        raise ControlError(
            f"{who} replaces the tokens of a prompt, and the pipeline was given prompt_embeds: give one."
        )
    read = sampling.tokens[0][0]
    words = (i for i, (a, b) in enumerate(read.spans) if a < b)
    return read.offset + next(words, 0 if read.start is None else 1)


def ground_token(sampling: Sampling) -> int:
    """The token that stands for the background: the start token, or where there is none the end of the text."""
    read = sampling.tokens[0][0]
    return read.offset + read.end if read.start is None else read.start


def learned_words(run: Run, control: Control) -> torch.Tensor:
    """What the losses of the last pipeline call added to the text, (pictures, tokens, channels) on the CPU.

    Raises ControlError where they learned nothing.
    """
    run.state(control)
    words = None if run.sampling is None else run.sampling.words
    if words is None:
        raise ControlError(f"{control.name} has learned nothing: its window holds none of the steps that ran.")
    return words.detach().float().cpu()


def finest(layers: list[CrossMap]) -> tuple[int, int]:
    """(height, width) of the finest of the layers' grids."""
    return max((layer.grid[1:] for layer in layers), key=lambda size: size[0] * size[1])


def as_picture(probs: torch.Tensor, layer: CrossMap) -> torch.Tensor:
    """(batch, latent tokens, maps) -> (batch, maps, height, width) of the layer's grid."""
    return probs.transpose(1, 2).unflatten(-1, layer.grid[1:])
