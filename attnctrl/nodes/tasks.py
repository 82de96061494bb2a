"""Pipeline nodes for given pictures: edits, instructions, subjects and readouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from attnctrl.controls import REGISTRY
from attnctrl.edits import Edit
from attnctrl.errors import ControlError
from attnctrl.inversion import INVERSIONS
from attnctrl.layers import Layer
from attnctrl.nodes.forms import LAYERS, SUBJECTS, Node, Port, number, regions_port, text
from attnctrl.nodes.pictures import as_image, as_pictures, mask_picture
from attnctrl.nodes.pipeline import (
    CATEGORY,
    REPORT,
    Chosen,
    chosen,
    lines,
    methods_port,
    pipeline_port,
    sampled,
    ticking,
    with_gradients,
)
from attnctrl.nodes.places import Place
from attnctrl.pipelines import EditPipeline, InstructPipeline, SubjectsPipeline
from attnctrl.pipelines.subjects import NOISES
from attnctrl.references import Subject
from attnctrl.words import WAYS

Tick = Callable[[int, int], None]


def subject(
    phrase: str,
    image: torch.Tensor,
    strength: float,
    mask: torch.Tensor | None = None,
    regions: tuple[Place, ...] = (),
    subjects: tuple[Subject, ...] = (),
) -> tuple[tuple[Subject, ...]]:
    """One subject more. regions: where it belongs, at most one. Raises ControlError as `Subject` does."""
    if len(regions or ()) > 1:
        raise ControlError("a subject has at most one region: connect one node Region.")
    place = regions[0] if regions else None
    shown = None if mask is None else mask_picture(mask)
    where = None if place is None else (place.box if place.mask is None else mask_picture(place.mask))
    made = Subject(phrase, as_pictures(image)[0], shown, region=where, strength=strength)
    return ((*(subjects or ()), made),)


def layer(
    mask: torch.Tensor,
    dx: float,
    dy: float,
    resize: float,
    flip_horizontal: bool,
    remove: bool,
    layers: tuple[Layer, ...] = (),
) -> tuple[tuple[Layer, ...]]:
    """One object more that goes elsewhere in a given picture. Raises ControlError as `Layer` does."""
    made = Layer(mask_picture(mask), dx, dy, resize, flip_horizontal=flip_horizontal, remove=remove)
    return ((*(layers or ()), made),)


def as_edits(given: str, masks: dict[str, Any]) -> list[Edit]:
    """Edits from lines "words = other words". Raises ControlError for a line without =, and a mask of no edit."""
    found = []
    for line in lines(given):
        words, equals, other = line.partition("=")
        if not equals or not words.strip():
            raise ControlError(f'the edit "{line[:60]}" is none: write words = other words, one edit a line.')
        found.append(Edit(words.strip(), other.strip(), masks.pop(words.strip().lower(), None)))
    if masks:
        raise ControlError(
            f'a region is for "{next(iter(masks))}", which no edit changes: its phrase is words of an edit.'
        )
    return found


@with_gradients
def edit(
    pipeline: Any,
    image: torch.Tensor,
    source_prompt: str,
    edits: str,
    target_prompt: str,
    inversion: str,
    feather: int,
    steps: int,
    guidance: float,
    seed: int,
    tick: Tick,
    methods: Chosen = (),
    regions: tuple[Place, ...] = (),
    mask: torch.Tensor | None = None,
    layers: tuple[Layer, ...] = (),
    foreground: torch.Tensor | None = None,
    silhouette: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, str]:
    """The edited picture, what the run made of the given one, and the report."""
    picture = as_pictures(image)[0]
    named = {name: dict(given) for name, given in chosen(methods, ("editing", "guidance"), "Edit").items()}
    masks = {place.phrase.lower(): _mask(place, picture.size) for place in regions or ()}
    if "prime-composer" in named:
        named["prime-composer"] |= _pasted(foreground, silhouette, regions)
        masks = {}
    result = EditPipeline(pipeline)(
        picture,
        source_prompt,
        target_prompt.strip() or None,
        edits=as_edits(edits, masks),
        layers=layers or (),
        method=named or "none",
        inversion=inversion,
        mask=None if mask is None else mask_picture(mask),
        feather=feather,
        num_inference_steps=steps,
        guidance=guidance or None,
        seed=seed,
        **ticking(pipeline, tick),
    )
    return as_image(result.images), as_image([result.reconstruction]), str(result.run.report)


def _mask(place: Place, size: tuple[int, int]) -> Any:
    return (place.region().raster(size[1], size[0], "nearest").numpy() * 255).astype(np.uint8)


def _pasted(foreground: Any, silhouette: Any, regions: Sequence[Place] | None) -> dict[str, Any]:
    if foreground is None or not regions or regions[0].box is None:
        raise ControlError(
            "prime-composer pastes an object: connect a foreground, and one region with its box and phrase."
        )
    shown = None if silhouette is None else mask_picture(silhouette)
    picture = as_pictures(foreground)[0]
    return {"foreground": picture, "silhouette": shown, "box": regions[0].box, "phrase": regions[0].phrase}


@with_gradients
def instruct(
    pipeline: Any,
    image: torch.Tensor,
    instruction: str,
    phrases: str,
    image_guidance: float,
    steps: int,
    guidance: float,
    seed: int,
    tick: Tick,
    methods: Chosen = (),
) -> tuple[torch.Tensor, str]:
    """The picture as an instruction changes it, on InstructPix2Pix, and the report."""
    controls = []
    for name, given in chosen(methods, ("editing", "guidance"), "Instruct").items():
        of = REGISTRY[name]
        about = {"phrases": lines(phrases)} if "phrases" in of.settings else {}
        controls.append(of.make(**given, **about))
    result = InstructPipeline(pipeline)(
        as_pictures(image)[0], instruction, method=controls, guidance=guidance, image_guidance=image_guidance,
        num_inference_steps=steps, seed=seed, **ticking(pipeline, tick),
    )  # fmt: skip
    return as_image(result.images), str(result.run.report)


@with_gradients
def draw_subjects(
    pipeline: Any,
    prompt: str,
    subjects: tuple[Subject, ...],
    reference_noise: str,
    words: str,
    steps: int,
    guidance: float,
    seed: int,
    tick: Tick,
    methods: Chosen = (),
) -> tuple[torch.Tensor, str]:
    """A picture with given subjects, and the report. "delayed-subject" has a word learned or found for each first."""
    named: Any = chosen(methods, ("subjects", "layout", "guidance"), "Draw subjects")
    result = SubjectsPipeline(pipeline)(
        prompt, subjects, method=named or "none", reference_noise=reference_noise, words=words,
        num_inference_steps=steps, guidance=guidance or None, seed=seed, **ticking(pipeline, tick),
    )  # fmt: skip
    return as_image(result.images), result.report


def _image(name: str = "image", about: str = "", optional: bool = False) -> Port:
    return Port(name, "IMAGE", about, optional=optional)


IMAGES = Port("images", "IMAGE")
NODES = (
    Node(
        "AttnCtrlSubject", "Subject (attnctrl)", CATEGORY, "Somebody or something with a look of its own.",
        (
            text("phrase", about="words of the prompt that mean it"), _image(about="what it looks like"),
            number("strength", 1.0, 0, 10, "how much of it"),
            Port("mask", "MASK", "where the picture shows it", optional=True),
            regions_port(optional=True), Port("subjects", SUBJECTS, optional=True),
        ),
        (Port("subjects", SUBJECTS),), subject,
    ),
    Node(
        "AttnCtrlLayer", "Layer (attnctrl)", CATEGORY, "An object of a given picture that goes elsewhere.",
        (
            Port("mask", "MASK", "the object"), number("dx", 0.0, -1, 1, "to the right, in fractions of the width"),
            number("dy", 0.0, -1, 1, "down, in fractions of the height"), number("resize", 1.0, 0.05, 20, "its size"),
            Port("flip_horizontal", "BOOLEAN", "left becomes right", False),
            Port("remove", "BOOLEAN", "it goes, and the rest does not matter", False),
            Port("layers", LAYERS, optional=True),
        ),
        (Port("layers", LAYERS),), layer,
    ),
    Node(
        "AttnCtrlEdit", "Edit (attnctrl)", CATEGORY, "Changes a given picture by changing its prompt.",
        (
            pipeline_port(), _image(), text("source_prompt", about="what the picture shows", lines=True),
            text("edits", about="words = other words, one edit a line", lines=True),
            text("target_prompt", about="what the edited picture shows; empty: as the edits say"),
            Port("inversion", "COMBO", "how the noise of the picture is found", "direct", choices=tuple(INVERSIONS)),
            number("feather", 4, 0, 256, "pixels over which the edit and the given picture blend"),
            *sampled(50), methods_port(), regions_port(optional=True),
            Port("mask", "MASK", "where the picture may change", optional=True),
            Port("layers", LAYERS, "for design-edit", optional=True),
            _image("foreground", "for prime-composer", True),
            Port("silhouette", "MASK", "of the foreground", optional=True),
        ),
        (IMAGES, Port("reconstruction", "IMAGE"), REPORT), edit, ("tick",),
    ),
    Node(
        "AttnCtrlInstruct", "Instruct (attnctrl)", CATEGORY, "Changes a picture by an instruction (InstructPix2Pix).",
        (
            pipeline_port(), _image(), text("instruction", lines=True),
            text("phrases", about="for each instruction the words that say where, one a line", lines=True),
            number("image_guidance", 1.5, 0, 20, "scale of the given picture"), *sampled(50), methods_port(),
        ),
        (IMAGES, REPORT), instruct, ("tick",),
    ),
    Node(
        "AttnCtrlDrawSubjects", "Draw subjects (attnctrl)", CATEGORY, "Draws given subjects in a picture.",
        (
            pipeline_port(), text("prompt", lines=True), Port("subjects", SUBJECTS),
            Port("reference_noise", "COMBO", "how references are noised", "one", choices=NOISES),
            Port("words", "COMBO", "how methods that want words come by them", WAYS[0], choices=WAYS),
            *sampled(50), methods_port(),
        ),
        (IMAGES, REPORT), draw_subjects, ("tick",),
    ),
)  # fmt: skip
