"""`bench guidance`: does guidance from attention make objects well formed, with and without a prompt?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from attnctrl.bench.draw import Settings, draw
from attnctrl.bench.methods import NONE, Spec
from attnctrl.bench.results import Results, Row
from attnctrl.bench.stats import mean_interval
from attnctrl.bench.tasks import Task, make_tasks
from attnctrl.controls import REGISTRY
from attnctrl.errors import ControlError
from attnctrl.shapes.detect import Detection, detect
from attnctrl.shapes.score import Asked, bound, present

TABLE = ("well_formed", "found", "present", "colour", "bound")
IMAGES, QUICK_IMAGES = 200, 8
OBJECTS = (0, 3)
"""Objects that are asked for; 0 stands for no prompt and no guidance by it."""

WELL_FORMED = 0.85
"""The overlap with its template from which on an object is well formed: what clean shapes score."""

NEED_PROMPT = ("semantic-cfg",)
"""Methods that scale the guidance by the prompt, and so have nothing to act on without it."""


@dataclass(frozen=True)
class Unprompted(Task):
    """A task whose prompt is empty."""

    @property
    def prompt(self) -> str:
        return ""


def default_methods() -> str:
    """The stock pipeline and every registered guidance method."""
    return ",".join([NONE, *(m.name for m in REGISTRY.values() if m.task == "guidance")])


def colour_accuracy(asked: Asked, detection: Detection) -> float | None:
    """Of the asked objects whose shape is there, the share that is there in its colour; None where no shape is."""
    shapes = {found.shape for found in detection.objects}
    both = {(found.shape, found.colour) for found in detection.objects}
    there = [pair in both for pair in asked if pair[0] in shapes]
    return sum(there) / len(there) if there else None


def judge(picture: np.ndarray, asked: Asked | None) -> dict[str, float | None]:
    """Of one picture: the share of its objects that are well formed (0 where there is none), their number, and, where
    something was asked, whether it is there. None for what it cannot say."""
    detection = detect(picture)
    good = [found.score >= WELL_FORMED for found in detection.objects]
    score: dict[str, float | None] = {"well_formed": sum(good) / max(1, len(good)), "found": float(len(good))}
    if asked is not None:
        score |= {"present": present(asked, detection), "bound": float(bound(asked, detection))}
        score["colour"] = colour_accuracy(asked, detection)
    return score


def measure(
    pipe: Any, specs: Sequence[Spec], objects: Sequence[int], images: int, settings: Settings, results: Results
) -> None:
    """Add the rows that `results` does not hold yet."""
    for n in objects:
        tasks: Sequence[Task] = make_tasks(max(n, 1), images, settings.split, settings.seed)
        if n == 0:
            tasks = [Unprompted(task.layout, task.seed) for task in tasks]
        own = settings if n else replace(settings, guidance=1.0)
        for spec in specs:
            needs = any(part.method.name in NEED_PROMPT for part in spec.parts)
            if results.find(spec.label, n) is None and not (needs and n == 0):
                results.add(_row(pipe, tasks, spec, own, n))


def _row(pipe: Any, tasks: Sequence[Task], spec: Spec, settings: Settings, objects: int) -> Row:
    try:
        made = draw(pipe, tasks, spec, settings)
    except ControlError as error:
        return Row(spec.label, objects, 0, error=str(error))
    asked = [task.layout.asked if objects else None for task in tasks]
    scores = [judge(one, a) for one, a in zip(made.pictures, asked, strict=True)]
    said = {name: [s[name] for s in scores if s[name] is not None] for name in scores[0]}
    metrics = {
        name: mean_interval([float(v) for v in values if v is not None]) for name, values in said.items() if values
    }
    return Row(spec.label, objects, len(tasks), metrics, made.seconds_per_image)
