"""What the page's buttons do, without the page: a checked request and its pictures in, pictures out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PIL import Image

from attnctrl.control import Control
from attnctrl.controls import method
from attnctrl.edits import Edit
from attnctrl.errors import ControlError
from attnctrl.fields import arguments, make
from attnctrl.install import share
from attnctrl.layers import Layer
from attnctrl.maps import Maps
from attnctrl.nouns import find_pairs
from attnctrl.pipelines import EditPipeline, SubjectsPipeline
from attnctrl.references import Subject
from attnctrl.run import control
from attnctrl.ui.backend import Backend
from attnctrl.ui.clips import heated, strip
from attnctrl.ui.given import check_edit, check_sides, masks_of, placed
from attnctrl.ui.jobs import Watch
from attnctrl.ui.reading import read
from attnctrl.ui.request import Request
from attnctrl.ui.result import Drawn, Pictures, Result


def draw(backend: Backend, request: Request, watch: Watch, pictures: Pictures = ()) -> Result:
    """Raises ControlError for what cannot be, Stopped when the watch says so."""
    runs: dict[str, Callable[..., Result]] = {
        "layout": layout, "video": layout, "edit": edit, "subjects": subjects, "read": read, "explain": explain
    }  # fmt: skip
    return runs[request.task](backend, request, watch, pictures)


def controls_of(request: Request, backend: Backend) -> list[Control]:
    """The controls of a request of the tabs layout and video.

    Raises ControlError where a method lacks what it is about.
    """
    regions = [place.region() for place in request.regions]
    return [
        make(name, given, subject_of(name, request, regions), backend.files) for name, given in request.methods.items()
    ]


def layout(backend: Backend, request: Request, watch: Watch, pictures: Pictures = ()) -> Result:
    """The controlled picture or clip, then the stock one of the same seed."""
    controls, pipe = controls_of(request, backend), share(backend.pipe)
    what = "clip" if backend.clips else "picture"
    controlled, maps, report = None, None, ""
    if controls:
        # Before the stock picture: it is here that input is refused.
        given = backend.arguments(pipe, request, watch, f"controlled {what}")
        with control(pipe, *controls, record=list(request.phrases) or True) as run:
            controlled = backend.draw(pipe, given)
        maps, report = run.maps, str(run.report)
    stock = backend.draw(pipe, backend.arguments(pipe, request, watch, f"stock {what}"))
    overlays = [(strip(stock), "stock")] if isinstance(stock, list) else []
    if controlled is not None and maps is not None:
        overlays += _overlays(maps, controlled)
    return Result(stock, controlled, overlays, report, maps)


def explain(backend: Backend, request: Request, watch: Watch, pictures: Pictures = ()) -> Result:
    """The stock picture, with a map of every phrase, or of every word where none is named."""
    phrases = list(request.phrases)
    if not phrases:
        text, words = backend.words(request.prompt)
        phrases = [text[a:b] for a, b in words if text[a].isalnum()]
    pipe = share(backend.pipe)
    with control(pipe, record=list(dict.fromkeys(phrases))) as run:
        picture = pipe(**backend.arguments(pipe, request, watch, "picture")).images[0]
    return Result(picture, None, _overlays(run.maps, picture), str(run.report), run.maps)


def edit(backend: Backend, request: Request, watch: Watch, pictures: Pictures = ()) -> Result:
    """The given picture redrawn, and redrawn under the other prompt; a region confines the edit of its words."""
    if not pictures:
        raise ControlError("there is no picture: upload one.")
    picture = pictures[0]
    check_edit(request)
    check_sides(picture)
    masks = masks_of(request, picture.size)
    told: dict[str, Any] = backend.callback(backend.pipe, watch, "edited picture")
    result = EditPipeline(backend.pipe)(
        picture,
        request.prompt,
        request.target or None,
        edits=[Edit(words, other, masks.get(words.lower())) for words, other in request.edits],
        layers=[
            Layer(masks[one.phrase.lower()], one.dx, one.dy, one.resize, remove=one.remove) for one in request.moves
        ],
        method={name: arguments(name, given, {}, backend.files) for name, given in request.methods.items()},
        inversion=request.inversion,
        feather=request.feather,
        num_inference_steps=request.steps,
        guidance=request.guidance,
        seed=request.seed,
        **told,
    )
    return Result(result.reconstruction, result.images[0], report=str(result.run.report))


def subjects(backend: Backend, request: Request, watch: Watch, pictures: Pictures = ()) -> Result:
    """The picture with its subjects, then the stock one of the same seed; overlays begin with the references."""
    sitters = subjects_of(request, pictures)
    told: dict[str, Any] = backend.callback(backend.pipe, watch, "controlled picture", row=0)
    result = SubjectsPipeline(backend.pipe)(
        request.prompt,
        sitters,
        method={name: arguments(name, given, {}, backend.files) for name, given in request.methods.items()},
        words=request.words,
        reference_noise=request.noise,
        num_inference_steps=request.steps,
        guidance=request.guidance,
        seed=request.seed,
        **told,
    )
    pipe = share(backend.pipe)
    stock = pipe(**backend.arguments(pipe, request, watch, "stock picture")).images[0]
    controlled, maps = result.images[0], result.run.maps
    names = [one.phrase for one in sitters if one.strength > 0 for _ in one.references]
    # Methods that look at no rows of references have none drawn.
    names = names[: len(result.references)]
    drawn = [(one, f"reference: {name}") for one, name in zip(result.references, names, strict=True)]
    return Result(stock, controlled, [*_overlays(maps, controlled), *drawn], result.report, maps)


def subjects_of(request: Request, pictures: Pictures) -> list[Subject]:
    """The subjects with their shares of the pictures, in order, and their regions.

    Raises ControlError where the pictures are too few or too many, and for regions that are nobody's.
    """
    wanted = sum(one.pictures for one in request.subjects)
    if not request.subjects:
        raise ControlError("there are no subjects: give a picture and the words of the prompt that mean it.")
    if wanted != len(pictures):
        raise ControlError(f"the subjects have {wanted} pictures, and {len(pictures)} are given: upload the others.")
    regions = placed(
        request, [one.phrase for one in request.subjects], "which is no subject: its phrase is a subject's"
    )
    rest = iter(pictures)
    return [
        Subject(
            one.phrase, [next(rest) for _ in range(one.pictures)], region=regions.get(one.phrase.lower()),
            strength=one.strength,
        )
        for one in request.subjects
    ]  # fmt: skip


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


def _overlays(maps: Maps, picture: Drawn) -> list[tuple[Image.Image, str]]:
    if isinstance(picture, list):
        return [(strip(picture), "controlled"), *((heated(picture, maps, phrase), phrase) for phrase in maps.phrases)]
    return [(maps.overlay(picture, phrase), phrase) for phrase in maps.phrases]
