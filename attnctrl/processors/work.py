"""What a processor is asked to do at one site in one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from attnctrl.errors import ControlError
from attnctrl.kernels import TokenGroups
from attnctrl.report import Report
from attnctrl.sampling import Active
from attnctrl.sites import Call, Grid, Step


class StopForward(Exception):
    """Raised once the last map that a loss reads is recorded: the rest of the forward pass has no reader."""


@dataclass(frozen=True)
class Branch:
    """The rows of the denoiser's batch that belong to one guidance branch."""

    name: str
    rows: slice


def halves_of(rows: int, pictures: int) -> tuple[Branch, ...]:
    """The branches of a batch of `rows` for so many pictures. Raises ControlError for other numbers of rows."""
    if rows == pictures:
        return (Branch("cond", slice(0, pictures)),)
    if rows == 2 * pictures:
        return Branch("uncond", slice(0, pictures)), Branch("cond", slice(pictures, rows))
    raise ControlError(
        f"the denoiser got a batch of {rows} for {pictures} pictures: attnctrl knows pipelines that run the "
        "conditional rows alone or after as many unconditional ones."
    )


def thirds_of(rows: int, pictures: int) -> tuple[Branch, ...]:
    """The branches of a batch guided by a text and a given picture: both, the picture alone, neither.

    A batch of as many rows as pictures is not guided. Raises ControlError for other numbers of rows.
    """
    if rows == pictures:
        return (Branch("cond", slice(0, pictures)),)
    if rows == 3 * pictures:
        names = ("cond", "image", "uncond")
        return tuple(Branch(name, slice(i * pictures, (i + 1) * pictures)) for i, name in enumerate(names))
    raise ControlError(
        f"the denoiser got a batch of {rows} for {pictures} pictures: InstructPix2Pix has the rows of text and "
        "picture alone, or before as many of the picture alone and as many of neither."
    )


def call_of(rows: int, pictures: int, number: int) -> tuple[Branch, ...]:
    """The branch of call `number` (0, 1) of a step, where each branch has a call of its own, conditional first.

    Raises ControlError for a third call and for other numbers of rows.
    """
    if rows != pictures or number > 1:
        raise ControlError(
            f"the denoiser got call {number + 1} of a step, with a batch of {rows} for {pictures} pictures: attnctrl "
            "knows pipelines that run the conditional rows first and the unconditional ones in a second call."
        )
    return (Branch(("cond", "uncond")[number], slice(0, rows)),)


@dataclass(frozen=True)
class Work:
    """Everything a processor needs to know; made by the run for each denoiser call.

    text: how many text tokens the call has. active: the controls that act here now, by branch. observe: takes the
    call and, at sites with text keys, its map (batch, heads, latent tokens, text tokens); it may raise StopForward.
    observed_only: nothing but recording is wanted, so that the stock processor makes the output.
    """

    step: Step
    latents: Grid
    text: int
    branches: tuple[Branch, ...]
    active: dict[str, tuple[Active, ...]]
    report: Report
    observe: Callable[[Call, torch.Tensor | None, torch.Tensor | TokenGroups | None], None] | None = None
    observed_only: bool = False
