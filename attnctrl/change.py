"""`Change`: what the noise and loss points did to the denoiser's input in the current step."""

from __future__ import annotations

import torch


class Change:
    """The sum of the moves of one step; the sampler's latents must receive it as well as the denoiser's input."""

    def __init__(self) -> None:
        self.delta: torch.Tensor | None = None

    def clear(self) -> None:
        """Forget the change: the step is done."""
        self.delta = None

    def add(self, delta: torch.Tensor) -> None:
        """Add a move, float32 (pictures, latent channels, height, width); zeros leave the stock tensors in use."""
        if bool((delta != 0).any()):
            self.delta = delta if self.delta is None else self.delta + delta

    def of_input(self, sample: torch.Tensor) -> torch.Tensor:
        """The denoiser's input with the change in the latent channels of every branch; without one, the same tensor."""
        if self.delta is None:
            return sample
        moved = sample.clone()
        moved[:, : self.delta.shape[1]] += self.delta.to(sample.dtype).repeat(len(sample) // len(self.delta), 1, 1, 1)
        return moved

    def of_latents(self, sample: torch.Tensor, scale: float) -> torch.Tensor:
        """The sampler's latents with the same change. scale: what the denoiser's input is of the latents."""
        if self.delta is None:
            return sample
        return (sample.float() + self.delta.to(sample.device) / scale).to(sample.dtype)
