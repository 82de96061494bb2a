"""`Change`: what the noise and loss points did to the denoiser's input in the current step."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Change:
    """The sum of the moves of one step; the sampler's latents must receive it as well as the denoiser's input."""

    def __init__(self) -> None:
        self.delta: torch.Tensor | None = None

    def clear(self) -> None:
        """Forget the change: the step is done."""
        self.delta = None

    def add(self, delta: torch.Tensor) -> None:
        """Add a move, float32 in the sampler's layout, one row per picture; zeros leave the stock tensors in use."""
        if bool((delta != 0).any()):
            self.delta = delta if self.delta is None else self.delta + delta

    def of_input(self, sample: torch.Tensor, latents: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The denoiser's input with the change in every branch; without one, the same tensor.

        latents: gives the view of the sampler's latents in an input.
        """
        if self.delta is None:
            return sample
        moved = sample.clone()
        repeats = (len(sample) // len(self.delta), *[1] * (self.delta.ndim - 1))
        latents(moved).add_(self.delta.to(sample.dtype).repeat(repeats))
        return moved

    def of_latents(
        self, sample: torch.Tensor, scale: float, drawn: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """The sampler's latents with the same change. scale: what the denoiser's input is of the latents.

        drawn: gives the view of those that the denoiser was given.
        """
        if self.delta is None:
            return sample
        moved = sample.to(torch.float32, copy=True)
        drawn(moved).add_(self.delta.to(sample.device) / scale)
        return moved.to(sample.dtype)
