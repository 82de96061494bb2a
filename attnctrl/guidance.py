"""Classifier-free guidance as a control sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch


@dataclass(frozen=True)
class Crop:
    """A part of some of the pictures, as a picture of its own.

    pictures: of the batch. rows, columns: of the latent grid, both with start and stop.
    """

    pictures: slice
    rows: slice
    columns: slice


class Again(Protocol):
    """Runs the denoiser once more in this step, without controls or under those of the run.

    context: other text embeddings (pictures, tokens, channels); by default the branch's own, without what controls put
    behind it. pooled: with them, for models that take one, (pictures, channels). crop: draw this part alone, rather
    than all pictures. branch: "cond", "uncond" or "image". Returns a prediction like those of `Prediction`, of the
    crop's size.
    controlled: under the attention points of all controls, as the branch itself was predicted; those of the control
    that asks take part if its `branches` name "again". Not with other text or a part of the picture.
    clean_change: (batch, channels, height, width), added to the clean picture in the denoiser's input, whose noise
    stays.
    Raises ControlError for crops of models that cannot draw them.
    """

    def __call__(
        self,
        context: torch.Tensor | None = None,
        *,
        pooled: torch.Tensor | None = None,
        crop: Crop | None = None,
        branch: str = "cond",
        controlled: bool = False,
        clean_change: torch.Tensor | None = None,
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class Prediction:
    """The denoiser's predictions of one step, each (batch, channels, height, width), frames before height for video.

    uncond is None without classifier-free guidance. combined: what the pipeline made of the two and the scheduler
    would get. again: further predictions. toward: the prediction under which a picture (batch or 1, channels, height,
    width) of clean latents is what the denoiser sees without its noise. toward_noise: likewise for the noise.
    clean: the picture that a prediction takes for what the denoiser sees without its noise, the inverse of `toward`.
    own: the conditional prediction as the denoiser made it, whatever earlier controls wanted. image: InstructPix2Pix's
    prediction with the given picture and without text, where guidance is by both; uncond has neither then.
    """

    cond: torch.Tensor
    uncond: torch.Tensor | None
    combined: torch.Tensor
    again: Again
    toward: Callable[[torch.Tensor], torch.Tensor]
    toward_noise: Callable[[torch.Tensor], torch.Tensor]
    clean: Callable[[torch.Tensor], torch.Tensor]
    own: torch.Tensor
    image: torch.Tensor | None = None

    @property
    def textless(self) -> torch.Tensor | None:
        """The prediction that guidance by the text leads away from; None without guidance."""
        return self.uncond if self.image is None else self.image

    @property
    def scale(self) -> float:
        """The guidance scale s of combined = uncond + s (cond - uncond), by least squares; 1 without guidance.

        Some pipelines keep theirs to themselves, and some rescale the combination afterwards. Of guidance by text and
        picture it is the text's (`scales`).
        """
        if self.uncond is None:
            return 1.0
        if self.image is not None:
            return self.scales[0]
        apart = (self.cond - self.uncond).double().flatten()
        length = float(apart @ apart)
        return float((self.combined - self.uncond).double().flatten() @ apart) / length if length else 1.0

    @property
    def scales(self) -> tuple[float, float]:
        """The scales s_T, s_I of combined = uncond + s_T (cond - image) + s_I (image - uncond), by least squares.

        InstructPix2Pix (arXiv 2211.09800, eq. 3). 1 where the text, or the picture, makes no difference.
        """
        assert self.uncond is not None
        assert self.image is not None
        uncond, image = self.uncond.double().flatten(), self.image.double().flatten()
        by = torch.stack([self.cond.double().flatten() - image, image - uncond])
        lengths = by.norm(dim=1)
        # Unit vectors, so that a text of little effect does not drown in rounding.
        units = by / lengths.clamp(min=1e-30)[:, None]
        found = torch.linalg.pinv(units @ units.T) @ (units @ (self.combined.double().flatten() - uncond))
        text, picture = (float(f / n) if n > 0 else 1.0 for f, n in zip(found, lengths, strict=True))
        return text, picture

    def guided(
        self, cond: torch.Tensor, uncond: torch.Tensor | None = None, image: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What the pipeline's guidance makes of another conditional prediction, and of other ones without text.

        uncond, image: by default those of the step.
        """
        uncond = self.uncond if uncond is None else uncond
        if uncond is None:
            return cond
        if self.image is None:
            return uncond + self.scale * (cond - uncond)
        image = self.image if image is None else image
        of_text, of_picture = self.scales
        return uncond + of_text * (cond - image) + of_picture * (image - uncond)

    def after(self, combined: torch.Tensor) -> Prediction:
        """What the next control sees once this one wanted `combined`: a conditional prediction that leads there."""
        if self.uncond is None:
            cond = combined
        elif self.image is None:
            cond = self.uncond + (combined - self.uncond) / self.scale
        else:
            cond = self.cond + (combined - self.combined) / self.scale
        return replace(self, cond=cond, combined=combined)
