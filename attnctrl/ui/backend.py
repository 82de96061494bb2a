"""The model of a page: what the page asks of it before a run, and what a run calls it with."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from attnctrl.encoding import decode_latents
from attnctrl.errors import ControlError
from attnctrl.install import share
from attnctrl.models import SHIPPED, call_arguments
from attnctrl.processors import attention_kinds, family_of
from attnctrl.prompt import PromptTokens, find_everywhere
from attnctrl.ui.jobs import Progress, Watch, watch_denoisers
from attnctrl.ui.request import Place, Request
from attnctrl.ui.result import Drawn

SHIPPED_CLIPS = "shapes-video"
"""The shipped model that draws clips."""

PREVIEW_SHARE = 0.2
"""The part of a run's time that may go into decoding pictures on the way."""


class Backend:
    """One set of weights; every run has a light copy of the pipeline.

    A page is drawn and served before its model is there: `open` brings it, and whatever asks for it earlier waits.
    model: the pipeline's name, for snippets and in pictures. files: plans that forms may name, by their file name.
    """

    def __init__(self, model: str, files: Mapping[str, Path] | None = None) -> None:
        self.model, self.files = model, dict(files or {})
        self._opened: Future[Any] = Future()
        # Tokenizers keep a state: the checks of all visitors share one copy, in turn.
        self._reading = threading.Lock()

    def open(self, load: Callable[[], Any]) -> Backend:
        """Load the pipeline. Raises what `load` does, and ControlError for models without support and for those that
        begin with a picture or a clip, for which a page has no field; so does `pipe`."""
        try:
            pipe = load()
            family_of(pipe)
            _check_begins_with_words(pipe)
            pipe.set_progress_bar_config(disable=True)
            watch_denoisers(pipe)
        except BaseException as error:
            self._opened.set_exception(error)
            raise
        self._opened.set_result(pipe)
        return self

    @property
    def pipe(self) -> Any:
        """The pipeline, once it is loaded."""
        return self._opened.result()

    @property
    def clips(self) -> bool:
        """Whether the model draws clips, lists of frames, and not pictures."""
        return _draws_clips(self.pipe)

    @cached_property
    def family(self) -> Any:
        return family_of(self.pipe)

    @cached_property
    def kinds(self) -> set[str]:
        """The kinds of attention that the model has."""
        return attention_kinds(self.pipe)

    @cached_property
    def _reader(self) -> Any:
        return share(self.pipe)

    @property
    def guidance(self) -> float | None:
        """The guidance scale that a page begins with."""
        return 3.5 if self.model.startswith(SHIPPED) else None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels of pictures and clips of no given size."""
        if self.clips:
            usual = inspect.signature(type(self.pipe).__call__).parameters
            tall, wide = (_usual(self.model).get(n) or usual[n].default or 1 for n in ("height", "width"))
            return int(tall), int(wide)
        default = self.pipe.default_sample_size if hasattr(self.pipe, "default_sample_size") else None
        config = self.family.model.config
        side = default or config.get("sample_size") or 128
        height, width = (side, side) if isinstance(side, int) else (int(side[0]), int(side[1]))
        return height * self.pipe.vae_scale_factor, width * self.pipe.vae_scale_factor

    def tokens(self, prompt: str) -> list[PromptTokens]:
        """The prompt under each of the model's tokenizers."""
        defaults: dict[str, Any] = {}
        for function in (type(self.pipe).__call__, self.pipe.encode_prompt):
            for name, parameter in inspect.signature(function).parameters.items():
                if parameter.default is not parameter.empty:
                    defaults.setdefault(name, parameter.default)
        arguments = defaults | self.family.required(self.pipe)
        with self._reading:
            return [reader.read(prompt) for reader in self.family.readers(self._reader, arguments)]

    def words(self, prompt: str) -> tuple[str, list[tuple[int, int]]]:
        """The prompt as the model reads it, and the (start, end) of its words: tokens that touch are one word."""
        tokens = self.tokens(prompt)[0]
        text = tokens.prompt
        found: list[tuple[int, int]] = []
        for start, end in sorted(s for s in tokens.spans if s[0] < s[1]):
            # Some tokenizers count the space before a word to it.
            start += len(text[start:end]) - len(text[start:end].lstrip())
            joined = found and start <= found[-1][1] and text[start:end].isalnum() == text[start - 1].isalnum()
            if joined:
                found[-1] = (found[-1][0], max(end, found[-1][1]))
            elif start < end:
                found.append((start, end))
        return text, found

    def check(self, prompt: str, places: tuple[Place, ...]) -> None:
        """Raises ControlError for a phrase that is not in the prompt, showing the prompt's tokens."""
        tokens = self.tokens(prompt) if places else []
        for place in places:
            find_everywhere(tokens, place.phrase)

    def arguments(self, pipe: Any, request: Request, watch: Watch, what: str) -> dict[str, Any]:
        """What to call the pipeline with for a request that gives no picture."""
        given = {
            **_usual(self.model),
            **({"output_type": "pil"} if self.clips else {}),
            "num_inference_steps": request.steps,
            # Drawn on the CPU, noise is the same on every device.
            "generator": torch.Generator().manual_seed(request.seed),
            **{name: side for name, side in (("height", request.height), ("width", request.width)) if side},
            **self.callback(pipe, watch, what),
        }
        return call_arguments(pipe, request.prompt, request.guidance, given)

    def draw(self, pipe: Any, given: Mapping[str, Any]) -> Drawn:
        """The picture, or the clip's frames, of a call with `arguments`."""
        drawn = pipe(**given)
        return drawn.frames[0] if self.clips else drawn.images[0]

    @property
    def _decodable(self) -> bool:
        """Whether one frame can be decoded by itself: of clips, where the autoencoder is like Wan's."""
        return not self.clips or "latents_mean" in self.pipe.vae.config

    def callback(self, pipe: Any, watch: Watch, what: str, row: int = -1) -> dict[str, Callable]:
        """The pipeline's argument that tells the watch of each step, with a picture where there is time for one.

        row: of the batch, which picture that is.
        """
        spent, began = 0.0, time.monotonic()

        def after_step(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            nonlocal spent
            watch.check()
            total, start = int(pipe.num_timesteps), time.monotonic()
            shown = None
            shows = index + 1 < total and watch.grid is not None and self._decodable
            if shows and spent <= PREVIEW_SHARE * (start - began):
                latents = self.family.unpacked(values["latents"][[row]], watch.grid)
                # A clip's first frame: autoencoders that look back in time decode it by itself.
                latents = latents[:, :, 0] if self.clips else latents
                shown = decode_latents(pipe, latents)[0]
                spent += time.monotonic() - start
            watch.tell(Progress(what, index + 1, total, shown))
            return {}

        accepted = inspect.signature(type(pipe).__call__).parameters
        return {"callback_on_step_end": after_step} if "callback_on_step_end" in accepted else {}


def _draws_clips(pipe: Any) -> bool:
    return hasattr(pipe, "video_processor")


def _check_begins_with_words(pipe: Any) -> None:
    """Raises ControlError for pipelines of clips whose call also takes a picture or a clip to begin with."""
    given = inspect.signature(type(pipe).__call__).parameters.keys() & {"image", "video"}
    if _draws_clips(pipe) and given:
        raise ControlError(
            f"{type(pipe).__name__} begins with a given {min(given)}, for which the page has no field: open a "
            "text-to-video model, or use attnctrl.control(pipe, ...) in Python."
        )


def _usual(model: str) -> dict[str, Any]:
    """What a call of the model is given where the request says nothing else."""
    if model != SHIPPED_CLIPS:
        return {}
    from attnctrl.shapes import VIDEO_CALL

    return VIDEO_CALL
