"""What the page's buttons do, without the page: a checked request in, pictures out."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from attnctrl.control import Control
from attnctrl.controls import method
from attnctrl.edits import Edit
from attnctrl.encoding import decode_latents
from attnctrl.errors import ControlError
from attnctrl.fields import arguments, make
from attnctrl.install import share
from attnctrl.maps import Maps
from attnctrl.models import SHIPPED, call_arguments
from attnctrl.nouns import find_pairs
from attnctrl.pipelines import EditPipeline
from attnctrl.processors import attention_kinds, family_of
from attnctrl.prompt import PromptTokens, find_everywhere
from attnctrl.run import control
from attnctrl.ui.jobs import Progress, Watch, watch_denoisers
from attnctrl.ui.request import Place, Request

PREVIEW_SHARE = 0.2
"""The part of a run's time that may go into decoding pictures on the way."""


@dataclass(frozen=True)
class Result:
    """stock, controlled: the pictures; of an edit, what the run makes of the given one unchanged, and the edited one.

    overlays: heat maps over the picture, with their phrases. report: what acted where, and what it cost.
    """

    stock: Image.Image | None
    controlled: Image.Image | None
    overlays: list[tuple[Image.Image, str]] = field(default_factory=list)
    report: str = ""
    maps: Maps | None = None


class Backend:
    """One set of weights; every run has a light copy of the pipeline. Raises ControlError for models without support.

    model: the pipeline's name, for snippets and in pictures. files: plans that forms may name, by their file name.
    """

    def __init__(self, pipe: Any, model: str, files: Mapping[str, Path] | None = None) -> None:
        self.family, self.kinds = family_of(pipe), attention_kinds(pipe)
        if not hasattr(pipe, "image_processor"):
            raise ControlError(f"{type(pipe).__name__} draws clips: the page is for models that draw pictures.")
        self.pipe, self.model, self.files = pipe, model, dict(files or {})
        pipe.set_progress_bar_config(disable=True)
        watch_denoisers(pipe)
        # Tokenizers keep a state: the checks of all visitors share one copy, in turn.
        self._reader, self._reading = share(pipe), threading.Lock()

    @property
    def guidance(self) -> float | None:
        """The guidance scale that a page begins with."""
        return 3.5 if self.model.startswith(SHIPPED) else None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels of pictures of no given size."""
        default = self.pipe.default_sample_size if hasattr(self.pipe, "default_sample_size") else None
        config = self.family.model.config
        side = default or config.get("sample_size") or 128
        height, width = (side, side) if isinstance(side, int) else (int(side[0]), int(side[1]))
        return height * self.pipe.vae_scale_factor, width * self.pipe.vae_scale_factor

    # checks ---------------------------------------------------------------------------------------------------
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

    def controls(self, request: Request) -> list[Control]:
        """The controls of a layout request. Raises ControlError where a method lacks what it is about."""
        regions = [place.region() for place in request.regions]
        made = []
        for name, given in request.methods.items():
            subject = subject_of(name, request, regions)
            made.append(make(name, given, subject, self.files))
        return made

    # runs -----------------------------------------------------------------------------------------------------
    def run(self, request: Request, watch: Watch, picture: Image.Image | None = None) -> Result:
        """Raises ControlError for what cannot be, Stopped when the watch says so."""
        if request.task == "edit":
            return self.edit(request, watch, picture)
        return self.layout(request, watch) if request.task == "layout" else self.explain(request, watch)

    def layout(self, request: Request, watch: Watch) -> Result:
        """The controlled picture, then the stock one of the same seed."""
        controls, pipe = self.controls(request), share(self.pipe)
        controlled, maps, report = None, None, ""
        if controls:
            # Before the stock picture: it is here that input is refused.
            arguments = self.arguments(pipe, request, watch, "controlled picture")
            with control(pipe, *controls, record=list(request.phrases) or True) as run:
                controlled = pipe(**arguments).images[0]
            maps, report = run.maps, str(run.report)
        stock = pipe(**self.arguments(pipe, request, watch, "stock picture")).images[0]
        overlays = [] if controlled is None or maps is None else _overlays(maps, controlled)
        return Result(stock, controlled, overlays, report, maps)

    def explain(self, request: Request, watch: Watch) -> Result:
        """The stock picture, with a map of every phrase, or of every word where none is named."""
        phrases = list(request.phrases)
        if not phrases:
            text, words = self.words(request.prompt)
            phrases = [text[a:b] for a, b in words if text[a].isalnum()]
        pipe = share(self.pipe)
        with control(pipe, record=list(dict.fromkeys(phrases))) as run:
            picture = pipe(**self.arguments(pipe, request, watch, "picture")).images[0]
        return Result(picture, None, _overlays(run.maps, picture), str(run.report), run.maps)

    def edit(self, request: Request, watch: Watch, picture: Image.Image | None) -> Result:
        """The given picture redrawn, and redrawn under the other prompt; a region confines the edit of its words."""
        if picture is None:
            raise ControlError("there is no picture: upload one.")
        masks = {place.phrase.lower(): mask_of(place, picture.size) for place in request.regions}
        known = [words.lower() for words, _ in request.edits]
        for words in masks:
            if words not in known:
                raise ControlError(f'a region is for "{words}", which no edit changes: its phrase is words of an edit.')
        told: dict[str, Any] = self.callback(self.pipe, watch, "edited picture")
        result = EditPipeline(self.pipe)(
            picture,
            request.prompt,
            request.target or None,
            edits=[Edit(words, other, masks.get(words.lower())) for words, other in request.edits],
            method={name: arguments(name, given, {}, self.files) for name, given in request.methods.items()},
            inversion=request.inversion,
            feather=request.feather,
            num_inference_steps=request.steps,
            guidance=request.guidance,
            seed=request.seed,
            **told,
        )
        return Result(result.reconstruction, result.images[0], report=str(result.run.report))

    def arguments(self, pipe: Any, request: Request, watch: Watch, what: str) -> dict[str, Any]:
        """What to call the pipeline with for a request that gives no picture."""
        given = {
            "num_inference_steps": request.steps,
            # Drawn on the CPU, noise is the same on every device.
            "generator": torch.Generator().manual_seed(request.seed),
            **{name: side for name, side in (("height", request.height), ("width", request.width)) if side},
            **self.callback(pipe, watch, what),
        }
        return call_arguments(pipe, request.prompt, request.guidance, given)

    def callback(self, pipe: Any, watch: Watch, what: str) -> dict[str, Callable]:
        """The pipeline's argument that tells the watch of each step, with a picture where there is time for one."""
        spent, began = 0.0, time.monotonic()

        def after_step(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            nonlocal spent
            watch.check()
            total, start = int(pipe.num_timesteps), time.monotonic()
            shown = None
            if index + 1 < total and watch.grid is not None and spent <= PREVIEW_SHARE * (start - began):
                latents = self.family.unpacked(values["latents"][-1:], watch.grid)
                shown = decode_latents(pipe, latents)[0]
                spent += time.monotonic() - start
            watch.tell(Progress(what, index + 1, total, shown))
            return {}

        accepted = inspect.signature(type(pipe).__call__).parameters
        return {"callback_on_step_end": after_step} if "callback_on_step_end" in accepted else {}


def subject_of(name: str, request: Request, regions: Any) -> dict[str, Any]:
    """What a layout request gives to the method `name`, by the field that takes it.

    Raises ControlError where the method would have nothing to act on.
    """
    found = method(name)
    subject: dict[str, Any] = {}
    if "regions" in found.settings:
        if not request.regions:
            raise ControlError(f"{name} places objects in regions: draw at least one.")
        subject["regions"] = regions
    if "phrases" in found.settings:
        if request.phrases:
            subject["phrases"] = list(request.phrases)
        elif found.control.__dataclass_fields__["phrases"].default is not None:
            subject["phrases"] = _named(name, request)
    return subject


def _named(name: str, request: Request) -> list[str]:
    """The phrases of the regions, or the nouns of the prompt, for a method that does not look for them itself."""
    found = [p.phrase for p in request.regions] or [one.noun.text for one in find_pairs(request.prompt)]
    if not found:
        raise ControlError(f"{name} needs phrases, and the prompt has no nouns that are found: name them.")
    return list(dict.fromkeys(found))


def mask_of(place: Place, size: tuple[int, int]) -> Image.Image:
    """A region as a mask of `size` (width, height), white inside."""
    inside = place.region().raster(size[1], size[0], "nearest")
    return Image.fromarray((inside.numpy() * 255).astype(np.uint8))


def _overlays(maps: Maps, picture: Image.Image) -> list[tuple[Image.Image, str]]:
    return [(maps.overlay(picture, phrase), phrase) for phrase in maps.phrases]
