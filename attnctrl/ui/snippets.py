"""A request as a program and as a command line that draw the same picture."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnctrl.control import Window
from attnctrl.controls import method
from attnctrl.errors import ControlError
from attnctrl.fields import arguments
from attnctrl.pipelines.methods import ANY_TASK
from attnctrl.ui.backend import SHIPPED_CLIPS
from attnctrl.ui.files import FRAME
from attnctrl.ui.reading import about_reading, center, check_reading
from attnctrl.ui.request import Place, Request
from attnctrl.ui.runs import subject_of

COMMANDS = {"layout": ("layout",), "edit": ("editing",), "subjects": ("subjects", "layout")}
"""The tabs that have a command, and the tasks of its methods."""


class _Name(str):
    """Text that stands in a program as it is."""

    __repr__ = str.__str__


def python(request: Request, model: str, files: Mapping[str, Path] | None = None) -> str:
    """A program that draws the request's picture or clip. Raises ControlError for requests that cannot be drawn."""
    others = {"edit": _edit, "subjects": _subjects, "read": _read}
    if request.task in others:
        return others[request.task](request, model, files or {})
    lines = ["import torch", "", "import attnctrl as ac", "from attnctrl.models import call_arguments, load_pipeline"]
    clips, shipped = request.task == "video", model == SHIPPED_CLIPS
    lines += ["from attnctrl.shapes import VIDEO_CALL"] if shipped else []
    lines += ["", f"pipe = load_pipeline({model!r})"]
    lines += _assigned("regions", [_region(p) for p in request.regions]) if request.regions else []
    lines.append(f"prompt = {request.prompt!r}")
    usual = ("**VIDEO_CALL, " if shipped else "") + ('"output_type": "pil", ' if clips else "")
    sizes = "".join(f', "{n}": {v}' for n, v in (("height", request.height), ("width", request.width)) if v)
    seed = f'"generator": torch.Generator().manual_seed({request.seed})'
    lines.append(f'given = {{{usual}"num_inference_steps": {request.steps}, {seed}{sizes}}}')
    drawn, part = ("frames", "frames") if clips else ("picture", "images")
    call = f"{drawn} = pipe(**call_arguments(pipe, prompt, {request.guidance!r}, given)).{part}[0]"
    if request.task == "explain":
        lines += [f"with ac.control(pipe, record={list(request.phrases)!r}) as run:", f"    {call}"]
        lines += ["for number, phrase in enumerate(run.maps.phrases):"]
        lines += ['    run.maps.overlay(picture, phrase).save(f"map-{number}.png")']
    elif request.methods:
        made = []
        for name, given in request.methods.items():
            subject = subject_of(name, request, _Name("regions"))
            made.append(_call(f"ac.{method(name).control.__name__}", arguments(name, given, subject, files or {})))
        record = f"    record={list(request.phrases)!r}," if request.phrases else None
        lines += ["with ac.control(", "    pipe,", *(f"    {one}," for one in made), *([record] if record else [])]
        lines += [") as run:", f"    {call}", "print(run.report)"]
    else:
        lines.append(call)
    save = 'picture.save("picture.png")'
    if clips:
        lines.append(f'more = {{"save_all": True, "append_images": frames[1:], "duration": {FRAME}, "loop": 0}}')
        save = 'frames[0].save("clip.webp", quality=90, **more)'
    return "\n".join([*lines, save, ""])


def _edit(request: Request, model: str, files: Mapping[str, Path]) -> str:
    lines = ["from PIL import Image", "", "import attnctrl as ac", "from attnctrl.pipelines import EditPipeline", ""]
    lines += [f"edit = EditPipeline.from_pretrained({model!r})", 'picture = Image.open("given.png")']
    masks = {}
    for number, place in enumerate(request.regions):
        raster = 'raster(picture.height, picture.width, "nearest").numpy()'
        masks[place.phrase.lower()] = f"mask{number}"
        lines.append(f"mask{number} = {_region(place)}.{raster}")
    edits = []
    for words, other in request.edits:
        mask = masks.get(words.lower())
        edits.append(_Name(f"ac.Edit({words!r}, {other!r}{', ' + mask if mask else ''})"))
    layers = []
    for one in request.moves:
        given = [f"{name}={getattr(one, name)!r}" for name in ("dx", "dy", "resize", "remove")]
        layers.append(_Name(f"ac.Layer({', '.join([masks[one.phrase.lower()], *given])})"))
    lines += ["result = edit(", "    picture,", f"    {request.prompt!r},"]
    lines += [f"    {request.target!r},"] if request.target else []
    lines += [f"    edits={edits!r},"] if edits else []
    lines += [f"    layers={layers!r},"] if layers else []
    lines += [f"    method={_methods(request, files)!r},"]
    lines += [f"    inversion={request.inversion!r},", f"    feather={request.feather},"]
    lines += [f"    num_inference_steps={request.steps},", f"    guidance={request.guidance!r},"]
    return "\n".join([*lines, f"    seed={request.seed},", ")", 'result.images[0].save("edited.png")', ""])


def _subjects(request: Request, model: str, files: Mapping[str, Path]) -> str:
    lines = [
        "from PIL import Image",
        "",
        "import attnctrl as ac",
        "from attnctrl.pipelines import SubjectsPipeline",
        "",
    ]
    lines += [f"draw = SubjectsPipeline.from_pretrained({model!r})"]
    places = {place.phrase.lower(): _region(place) for place in request.regions}
    made, number = [], 0
    for one in request.subjects:
        pictures = [_Name(f'Image.open("picture{number + i}.png")') for i in range(one.pictures)]
        number += one.pictures
        region = f", region={places[one.phrase.lower()]}" if one.phrase.lower() in places else ""
        made.append(_Name(f"ac.Subject({one.phrase!r}, {pictures!r}{region}, strength={one.strength!r})"))
    lines += _assigned("subjects", made)
    lines += [
        "result = draw(",
        f"    {request.prompt!r},",
        "    subjects,",
        f"    method={_methods(request, files)!r},",
    ]
    lines += [f"    words={request.words!r},", f"    reference_noise={request.noise!r},"]
    lines += [f"    num_inference_steps={request.steps},"]
    lines += [f"    guidance={request.guidance!r},", f"    seed={request.seed},", ")"]
    return "\n".join([*lines, 'result.images[0].save("picture.png")', ""])


def _read(request: Request, model: str, files: Mapping[str, Path]) -> str:
    check_reading(request)
    (name,) = request.methods
    about = "".join(f", {k}={_shown(v)!r}" for k, v in about_reading(request).items())
    lines = ["import numpy as np"] if name == "segment-like-me" else []
    lines += [
        "from PIL import Image",
        "",
        "import attnctrl as ac",
        "from attnctrl.pipelines import ReadoutPipeline",
        "",
    ]
    lines += [
        f"read = ReadoutPipeline.from_pretrained({model!r})",
        'picture = Image.open("picture0.png").convert("RGB")',
    ]
    if name == "segment":
        call = f"read.segment(picture, {request.prompt!r}, {list(request.phrases) or None!r}{about})"
        lines += [f"segments = {call}", "for number, phrase in enumerate(segments.phrases[0]):"]
        return "\n".join([*lines, '    segments.mask(phrase).save(f"mask-{number}.png")', ""])
    lines.append('other = Image.open("picture1.png").convert("RGB")')
    if name == "correspond":
        return "\n".join([*lines, f"print(read.correspond(picture, {center(request)!r}, other{about}))", ""])
    names = list(dict.fromkeys(place.phrase for place in request.regions))
    lines.append("labels = np.zeros((picture.height, picture.width), dtype=np.int64)")
    for place in request.regions:
        raster = f'{_region(place)}.raster(picture.height, picture.width, "nearest").numpy()'
        lines.append(f"labels[{raster} > 0.5] = {names.index(place.phrase) + 1}")
    lines += [f"parts = read.learn(picture, labels{about})", f"found = read.segment_like(other, parts{about})[0]"]
    return "\n".join([*lines, 'Image.fromarray(found.numpy().astype(np.uint8)).save("labels.png")', ""])


def _methods(request: Request, files: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    made = {name: arguments(name, given, {}, files) for name, given in request.methods.items()}
    return {name: {k: _shown(v) for k, v in given.items()} for name, given in made.items()}


def command(request: Request, model: str, files: Mapping[str, Path] | None = None) -> str:
    """The same as a command line. Raises ControlError, saying why, for requests that no command takes."""
    if request.task not in COMMANDS:
        what = {"read": "reading given pictures", "video": "clips"}.get(request.task, "maps")
        raise ControlError(f"the command line has no command for {what}: use the Python form.")
    _check_expressible(request)
    parts = ["attnctrl", request.task]
    if request.task == "layout":
        parts += ["--prompt", request.prompt]
        for place in request.regions:
            parts += ["--region", f"{place.phrase}@{','.join(map(repr, place.box or ()))}"]
        for name, side in (("--height", request.height), ("--width", request.width)):
            parts += [name, str(side)] if side else []
    elif request.task == "subjects":
        parts += ["--prompt", request.prompt]
        places = {place.phrase.lower(): ",".join(map(repr, place.box or ())) for place in request.regions}
        phrases = [one.phrase for one in request.subjects for _ in range(one.pictures)]
        for number, phrase in enumerate(phrases):
            box = places.get(phrase.lower(), "")
            parts += ["--subject", f"{phrase}=picture{number}.png" + (f"@{box}" if box else "")]
        parts += ["--words", request.words, "--noise", request.noise]
    else:
        parts += ["--image", "given.png", "--source", request.prompt]
        parts += ["--target", request.target] if request.target else []
        for words, other in request.edits:
            parts += ["--edit", f"{words}={other}"]
        parts += ["--inversion", request.inversion, "--feather", str(request.feather)]
    parts += ["--method", "+".join(request.methods) or "none", "--model", model]
    for name, given in request.methods.items():
        for parameter, value in arguments(name, given, {}, files or {}).items():
            parts += ["--set", f"{parameter}={value!r}"]
    parts += ["--seed", str(request.seed), "--steps", str(request.steps)]
    parts += ["--guidance", f"{request.guidance:g}"] if request.guidance is not None else []
    return shlex.join([*parts, "--out", "picture.png"])


def _check_expressible(request: Request) -> None:
    """Raise ControlError for what the options of the commands cannot say."""
    tasks = COMMANDS[request.task]
    if request.task == "layout" and not request.regions:
        raise ControlError("attnctrl layout needs a region: use the Python form.")
    if request.phrases:
        raise ControlError("the command line cannot name phrases: use the Python form.")
    if request.task == "edit" and request.regions:
        raise ControlError("the command line takes masks from files only: use the Python form.")
    if any(one.strength != 1 for one in request.subjects):
        raise ControlError("the command line cannot set a subject's strength: use the Python form.")
    if len({one.phrase.lower() for one in request.subjects}) != len(request.subjects):
        raise ControlError("the command line takes a phrase for one subject: use the Python form.")
    for place in request.regions:
        if place.box is None:
            raise ControlError("the command line takes boxes and mask files only: use the Python form for outlines.")
    for name, given in request.methods.items():
        if method(name).task not in (*tasks, ANY_TASK):
            raise ControlError(f"attnctrl {request.task} has no {method(name).task} methods: use the Python form.")
        for parameter in given:
            if parameter.startswith("window_"):
                raise ControlError("the command line cannot set a method's window: use the Python form.")
            for other in request.methods:
                if other != name and parameter in method(other).settings:
                    raise ControlError(f'"{parameter}" belongs to {name} and {other}: use the Python form.')


def _region(place: Place) -> _Name:
    shape = f"box={place.box!r}" if place.box is not None else f"polygon={place.polygon!r}"
    return _Name(f"ac.Region({place.phrase!r}, {shape})")


def _assigned(name: str, values: list[_Name]) -> list[str]:
    return [f"{name} = [", *(f"    {value}," for value in values), "]"]


def _call(function: str, given: Mapping[str, Any]) -> str:
    return f"{function}({', '.join(f'{name}={_shown(value)!r}' for name, value in given.items())})"


def _shown(value: Any) -> Any:
    return _Name(f"ac.Window({value.start!r}, {value.end!r})") if isinstance(value, Window) else value
