"""A given picture in; masks of words, of parts like those of an example, or a point's counterpart out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from attnctrl.control import Window
from attnctrl.controls.readout.correspond import Correspond
from attnctrl.controls.readout.hold_picture import HoldPicture
from attnctrl.controls.readout.segment import Segment, Segments
from attnctrl.controls.readout.segment_like_me import SegmentLikeMe
from attnctrl.errors import ControlError
from attnctrl.models import call_arguments, load_pipeline, side_multiple
from attnctrl.run import Run, control

LATE = Window(0.5, 1.0)
"""The steps in which the noise leaves something of a given picture to see."""

Point = tuple[float, float]
"""(x, y) in fractions of the picture, origin top left."""


@dataclass(frozen=True)
class Parts:
    """What SLiMe learned: the embeddings (parts - 1, channels), and the prompt whose first words they replace."""

    embeddings: torch.Tensor
    prompt: str


class ReadoutPipeline:
    """Reads given pictures with the attention of any supported text-to-image pipeline. Nothing is drawn.

        readout = ReadoutPipeline.from_pretrained("shapes-sd")
        segments = readout.segment(picture, "a red circle and a blue square", ["red circle"])
        segments.mask("red circle")
        parts = readout.learn(picture, labels)          # labels: (height, width) integers, 0 for the background
        readout.segment_like(other, parts)              # likewise, of another picture
        readout.correspond(picture, (0.3, 0.4), other)  # (x, y) in the other picture

    The sides of pictures are whole latents of the pipeline, mostly multiples of 8 or 16 pixels. steps: of the run
    along the picture; what is read is the mean over those in the control's window. params: of the control.
    call: further arguments of every call of the base pipeline, such as its callback.
    """

    def __init__(self, pipe: Any, call: Mapping[str, Any] | None = None) -> None:
        self.pipe, self.call = pipe, dict(call or {})

    @classmethod
    def from_pretrained(cls, model: str, **kwargs: Any) -> ReadoutPipeline:
        """model: "shapes-sd", "shapes-dit", a folder, a hub id; device, dtype: see `attnctrl.models.load_pipeline`."""
        return cls(load_pipeline(model, **kwargs))

    def segment(
        self,
        picture: Image.Image | Sequence[Image.Image],
        prompt: str | list[str],
        phrases: Any = None,
        *,
        steps: int = 10,
        seed: int = 0,
        **params: Any,
    ) -> Segments:
        """Masks of phrases of the prompt, which says what the picture shows; None for its nouns.

        Several pictures of one size: a prompt for each. Raises ControlError as `Segment` does, and for sides that are
        no whole latents.
        """
        params = {"window": LATE, **params}
        reader = Segment(phrases, **params)
        run, size = self._along(picture, prompt, reader, steps, seed)
        return reader.read(run, size)

    def learn(
        self,
        picture: Image.Image,
        labels: Any,
        *,
        prompt: str | None = None,
        steps: int = 25,
        seed: int = 0,
        **params: Any,
    ) -> Parts:
        """What the parts of a picture look like to the model, from labels (height, width) of the picture's size.

        prompt: the words to begin with, by default "part" for each. Raises ControlError as `SegmentLikeMe` does.
        """
        learner = SegmentLikeMe(labels, **params)
        if np.shape(labels) != (picture.height, picture.width):
            raise ControlError(
                f"the labels have the shape {np.shape(labels)}, and the picture has {picture.height} rows and "
                f"{picture.width} columns: give one label for each pixel."
            )
        words = " ".join(["part"] * (learner.parts - 1)) if prompt is None else prompt
        run, _ = self._along(picture, words, learner, steps, seed)
        return Parts(learner.words(run), words)

    def segment_like(
        self,
        picture: Image.Image | Sequence[Image.Image],
        parts: Parts,
        *,
        steps: int = 10,
        seed: int = 0,
        **params: Any,
    ) -> torch.Tensor:
        """The labels (pictures, height, width) of a picture, or of several of one size, as those that were learned."""
        reader = SegmentLikeMe(embeddings=parts.embeddings, **params)
        count = 1 if isinstance(picture, Image.Image) else len(picture)
        run, size = self._along(picture, [parts.prompt] * count, reader, steps, seed)
        return reader.read(run, size)

    def correspond(
        self,
        picture: Image.Image,
        point: Point,
        other: Image.Image,
        *,
        attempts: int = 5,
        steps: int = 25,
        seed: int = 0,
        **params: Any,
    ) -> Point:
        """The point of the other picture that is what `point` is in this one.

        attempts: texts that are learned and asked together.
        """
        learner = Correspond(point, seed=seed, **params)
        run, _ = self._along(picture, "", learner, steps, seed, attempts)
        reader = Correspond(embeddings=learner.words(run), **params)
        run, size = self._along(other, "", reader, steps, seed + 1, attempts)
        return reader.read(run, size)

    def _along(
        self,
        picture: Image.Image | Sequence[Image.Image],
        prompt: str | list[str],
        reader: Segment | SegmentLikeMe | Correspond,
        steps: int,
        seed: int,
        images: int = 1,
    ) -> tuple[Run, tuple[int, int]]:
        """A run along the picture, and its size."""
        pictures = [picture] if isinstance(picture, Image.Image) else list(picture)
        width, height = pictures[0].size
        multiple = side_multiple(self.pipe)
        if width % multiple or height % multiple or any(one.size != (width, height) for one in pictures):
            raise ControlError(
                f"the pictures have the sizes {', '.join(f'{p.width}x{p.height}' for p in pictures)}: all must have "
                f"the same, with sides that are multiples of {multiple} pixels."
            )
        count = images * len(pictures)
        arguments = {
            **self.call,
            "num_inference_steps": steps,
            "num_images_per_prompt": images,
            "height": height,
            "width": width,
            "output_type": "latent",
            "generator": [torch.Generator().manual_seed(seed + i) for i in range(count)],
        }
        held = HoldPicture([one.convert("RGB") for one in pictures for _ in range(images)])
        with control(self.pipe, reader, held, record=False) as run:
            self.pipe(**call_arguments(self.pipe, prompt, 1.0, arguments))
        return run, (width, height)
