"""What a page asks for, as data: checked when it comes in, written into the picture that comes out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from attnctrl.controls import method
from attnctrl.errors import ControlError
from attnctrl.fields import parameters
from attnctrl.regions import Region
from attnctrl.ui import checks

TASKS = {
    "layout": ("layout", "fidelity", "guidance", "sparse"),
    "edit": ("editing", "guidance"),
    "subjects": ("subjects", "layout", "guidance"),
    "read": ("readout",),
    "explain": (),
    "video": ("sparse", "layout", "guidance"),
}
"""The tabs, and the tasks of the methods that each offers."""

PROMPT, REGIONS, POINTS, STEPS, SIDE, SUBJECTS = 2000, 32, 512, 200, 2048, 8
"""Most characters of a prompt, regions, points of a polygon, steps, pixels of a side, subjects."""


@dataclass(frozen=True)
class Place:
    """A drawn region: a box (x0, y0, x1, y1) or a polygon of (x, y), fractions of the picture, and its phrase."""

    phrase: str
    box: tuple[float, ...] | None = None
    polygon: tuple[tuple[float, ...], ...] | None = None

    def region(self) -> Region:
        """Raises ControlError for shapes that cannot be."""
        box: Any = self.box
        return Region(self.phrase, box=box, polygon=self.polygon)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Move:
    """What becomes of the object in the region of this phrase: see `attnctrl.Layer`."""

    phrase: str
    dx: float = 0.0
    dy: float = 0.0
    resize: float = 1.0
    remove: bool = False


@dataclass(frozen=True)
class Sitter:
    """A subject: its phrase, how many of the given pictures show it, and how much of it there is to be."""

    phrase: str
    pictures: int = 1
    strength: float = 1.0


@dataclass(frozen=True)
class Request:
    """One run of the page. Pictures that it is about are given beside it, in order.

    task: a tab of `TASKS`. prompt: of an edit and of reading, what the given picture shows. methods: of each method, in
    order, what differs from its defaults. phrases: for methods without regions, and for maps. guidance: a scale under
    whatever name the model has for it, None for the model's default. target or edits, of (words, other words): of an
    edit. moves: of an edit's regions. subjects, noise, words: see `attnctrl.pipelines.SubjectsPipeline`.
    """

    task: str = "layout"
    prompt: str = ""
    regions: tuple[Place, ...] = ()
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    phrases: tuple[str, ...] = ()
    seed: int = 0
    steps: int = 25
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    target: str = ""
    edits: tuple[tuple[str, str], ...] = ()
    moves: tuple[Move, ...] = ()
    inversion: str = "direct"
    feather: int = 4
    subjects: tuple[Sitter, ...] = ()
    noise: str = "one"
    words: str = "learned"

    @classmethod
    def read(cls, given: Any) -> Request:
        """A request from JSON data of any origin. Raises ControlError, naming what is wrong."""
        if isinstance(given, str):
            try:
                given = json.loads(given[:1_000_000])
            except (ValueError, RecursionError):
                raise ControlError("the request is no JSON.") from None
        if not isinstance(given, Mapping):
            raise ControlError(f"the request is {given!r:.60}: give names with values.")
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                raise ControlError(f'a request has no "{str(name)[:60]}": it has {", ".join(known)}.')
        task = given.get("task", "layout")
        if not isinstance(task, str) or task not in TASKS:
            raise ControlError(f"task is {task!r:.60}: choose one of {', '.join(TASKS)}.")
        methods = _methods(given.get("methods", {}), task)
        return cls(
            task=task,
            # Parts and points are found without words.
            prompt=checks.text(given, "prompt", PROMPT)
            if task == "read" and "segment" not in methods
            else _prompt(given),
            regions=read_places(given.get("regions", ()), named=task != "read"),
            methods=methods,
            phrases=tuple(checks.phrase(p) for p in checks.listed(given.get("phrases", ()), "phrases", 64)),
            seed=checks.whole(given, "seed", 0, 0, 2**53 - 1),
            steps=checks.whole(given, "steps", 25, 1, STEPS),
            guidance=None if given.get("guidance") is None else checks.number(given, "guidance", 0.0, 0.0, 100.0),
            height=_side(given, "height"),
            width=_side(given, "width"),
            target=checks.text(given, "target", PROMPT),
            edits=tuple(_edit(e) for e in checks.listed(given.get("edits", ()), "edits", 16)),
            moves=tuple(_move(m) for m in checks.listed(given.get("moves", ()), "moves", 16)),
            inversion=checks.text(given, "inversion", 40) or "direct",
            feather=checks.whole(given, "feather", 4, 0, 256),
            subjects=tuple(_sitter(s) for s in checks.listed(given.get("subjects", ()), "subjects", SUBJECTS)),
            noise=checks.text(given, "noise", 40) or "one",
            words=checks.text(given, "words", 40) or "learned",
        )

    def data(self) -> dict[str, Any]:
        """As JSON data, without what is at its default: `read` of it gives the same request."""
        plain = json.loads(json.dumps(asdict(self)))
        usual = json.loads(json.dumps(asdict(Request())))
        places = [{k: v for k, v in place.items() if v is not None} for place in plain["regions"]]
        kept = {k: v for k, v in (plain | {"regions": places}).items() if v != usual[k]}
        return {"task": self.task, **kept}


def read_places(given: Any, named: bool = True) -> tuple[Place, ...]:
    """Drawn regions from JSON data, or from its text; named: each has a phrase, else "part 1" and so on will do.

    Raises ControlError for anything else.
    """
    if isinstance(given, str):
        try:
            given = json.loads(given[:1_000_000] or "[]")
        except (ValueError, RecursionError):
            raise ControlError("the regions are no JSON.") from None
    return tuple(_place(one, i + 1, named) for i, one in enumerate(checks.listed(given, "regions", REGIONS)))


def _place(given: Any, number: int, named: bool) -> Place:
    if not isinstance(given, Mapping) or set(given) - {"phrase", "box", "polygon"}:
        raise ControlError(f"region {number} is {given!r:.60}: give a phrase, and a box or a polygon.")
    phrase = given.get("phrase", "") or ("" if named else f"part {number}")
    if not isinstance(phrase, str) or not phrase.strip():
        raise ControlError(f"region {number} has no phrase: click the words of the prompt that belong there.")
    box, polygon = given.get("box"), given.get("polygon")
    if (box is None) == (polygon is None):
        raise ControlError(f'region {number} ("{phrase[:60]}") needs either a box or a polygon.')
    points = (
        None if polygon is None else tuple(_numbers(p, number) for p in checks.listed(polygon, "a polygon", POINTS))
    )
    place = Place(checks.phrase(phrase), None if box is None else _numbers(box, number), points)
    place.region()
    return place


def _numbers(given: Any, number: int) -> tuple[float, ...]:
    values = checks.listed(given, f"the shape of region {number}", 4)
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values):
        raise ControlError(f"region {number}: {given!r:.60} are no numbers: give fractions of the picture, 0 to 1.")
    return tuple(float(v) for v in values)


def _prompt(given: Mapping[str, Any]) -> str:
    prompt = checks.text(given, "prompt", PROMPT)
    if not prompt.strip():
        raise ControlError("there is no prompt: say what the picture shows.")
    return prompt


def _edit(given: Any) -> tuple[str, str]:
    pair = checks.listed(given, "an edit", 2)
    if (
        len(pair) != 2
        or not all(isinstance(text, str) and len(text) <= checks.PHRASE for text in pair)
        or not pair[0].strip()
    ):
        raise ControlError(f"the edit {given!r:.60} is none: give words of the prompt and other words.")
    return pair[0].strip(), pair[1].strip()


def _move(given: Any) -> Move:
    known = [f.name for f in fields(Move)]
    if not isinstance(given, Mapping) or set(given) - {*known}:
        raise ControlError(f"the move {given!r:.60} is none: give {', '.join(known)}.")
    remove = given.get("remove", False)
    if not isinstance(remove, bool):
        raise ControlError(f"remove is {remove!r:.60}: give true or false.")
    right, down = (checks.number(given, name, 0.0, -1.0, 1.0) for name in ("dx", "dy"))
    return Move(checks.phrase(given.get("phrase")), right, down, checks.number(given, "resize", 1.0, 0.1, 10.0), remove)


def _sitter(given: Any) -> Sitter:
    known = [f.name for f in fields(Sitter)]
    if not isinstance(given, Mapping) or set(given) - {*known}:
        raise ControlError(f"the subject {given!r:.60} is none: give {', '.join(known)}.")
    pictures, strength = (
        checks.whole(given, "pictures", 1, 1, SUBJECTS),
        checks.number(given, "strength", 1.0, 0.0, 10.0),
    )
    return Sitter(checks.phrase(given.get("phrase")), pictures, strength)


def _side(given: Mapping[str, Any], name: str) -> int | None:
    if given.get(name) is None:
        return None
    side = checks.whole(given, name, 0, 64, SIDE)
    if side % 8:
        raise ControlError(f"{name} is {side} pixels: give a multiple of 8.")
    return side


def _methods(given: Any, task: str) -> dict[str, dict[str, Any]]:
    if not isinstance(given, Mapping):
        raise ControlError(f"methods is {given!r:.60}: give each method's name with its parameters.")
    for name in given:
        found = method(str(name)[:60])
        if found.task not in TASKS[task]:
            raise ControlError(f'method "{name}" belongs to {found.task}, which is not for {task}.')
    return {name: parameters(name, params) for name, params in given.items()}
