"""`bench readout`: how near are the masks and points that attention gives to the exact ones?

Masks are compared with those of the detector on drawn pictures, and with the renderer's own on given ones; points with
where the renderer put the same part of the same object in another picture.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from attnctrl.bench.draw import Settings
from attnctrl.bench.methods import NONE, Spec
from attnctrl.bench.results import Results, Row
from attnctrl.bench.stats import mean_interval
from attnctrl.bench.tasks import Task, fitted, make_tasks
from attnctrl.controls.readout.segment import Segment
from attnctrl.errors import ControlError
from attnctrl.pipelines import ReadoutPipeline
from attnctrl.run import control
from attnctrl.shapes.detect import detect
from attnctrl.shapes.layouts import Layout
from attnctrl.shapes.render import thing_mask
from attnctrl.shapes.score import match

TABLE = ("iou", "error", "within")
IMAGES, QUICK_IMAGES = 100, 4
OBJECTS = (2,)
METHODS = "segment{refinements=0},segment,segment-like-me,none,correspond"
NEAR = 1 / 16
"""A point is `within` when it lies no farther than this part of the picture's side from the true one."""

Scores = list[dict[str, float]]
"""Of each picture: iou 0..1, error in pixels, within 0 or 1."""


def mask_iou(found: Any, exact: Any) -> float:
    """Intersection over union of two bool masks of one shape; 0 where both are empty."""
    a, b = np.asarray(found, dtype=bool), np.asarray(exact, dtype=bool)
    return float((a & b).sum() / max(1, (a | b).sum()))


def exact_masks(task: Task) -> list[np.ndarray]:
    """The renderer's mask of each object of `task.ideal`, bool (128, 128)."""
    return [(thing_mask(fitted(*thing)) > 0.5).numpy() for thing in task.layout.things]


def picture(task: Task) -> Image.Image:
    """What was asked, drawn exactly."""
    return Image.fromarray((task.ideal * 255).round().astype(np.uint8))


def elsewhere(task: Task, other: Task) -> Task:
    """The scene of `other` with the first object of `task` in the place of its own, and nothing else like that."""
    (shape, colour, _), (*_, box) = task.layout.things[0], other.layout.things[0]
    rest = [t for t in other.layout.things[1:] if t[0] != shape and t[1] != colour]
    return Task(Layout(((shape, colour, box), *rest), other.layout.background), other.seed)


def drawn(pipe: Any, tasks: Sequence[Task], params: dict[str, Any], settings: Settings) -> Scores:
    """Masks of the nouns of pictures while they are drawn, where the detector finds what was asked."""
    scores: Scores = []
    for first in range(0, len(tasks), settings.batch):
        some = tasks[first : first + settings.batch]
        reader = Segment([t.nouns for t in some], **params)
        with control(pipe, reader, record=False) as run:
            made = pipe(**{**settings.arguments(pipe, some), "output_type": "np"}).images
        read = reader.read(run, (made.shape[2], made.shape[1]))
        for i, task in enumerate(some):
            found = match(task.layout.asked, detect(made[i]))
            ious = [mask_iou(read.masks[i, k], one.mask) for k, one in enumerate(found) if one is not None]
            scores += [{"iou": float(np.mean(ious))}] if ious else []
    return scores


def given(pipe: Any, tasks: Sequence[Task], params: dict[str, Any], settings: Settings) -> Scores:
    """Masks of the nouns of rendered pictures, whose prompts are known."""
    scores: Scores = []
    for first in range(0, len(tasks), settings.batch):
        some = tasks[first : first + settings.batch]
        prompts, nouns = [t.prompt for t in some], [t.nouns for t in some]
        read = ReadoutPipeline(pipe).segment([picture(t) for t in some], prompts, nouns, **params)
        for i, task in enumerate(some):
            ious = [mask_iou(read.masks[i, k], exact) for k, exact in enumerate(exact_masks(task))]
            scores.append({"iou": float(np.mean(ious))})
    return scores


def like(pipe: Any, tasks: Sequence[Task], params: dict[str, Any], settings: Settings) -> Scores:
    """One object of a rendered picture is the example; its mask in another picture."""
    readout, scores = ReadoutPipeline(pipe), []
    for i, task in enumerate(tasks):
        other = elsewhere(task, tasks[(i + 1) % len(tasks)])
        parts = readout.learn(picture(task), exact_masks(task)[0].astype(int), seed=task.seed, **params)
        labels = readout.segment_like(picture(other), parts, seed=other.seed, **params)
        scores.append({"iou": mask_iou(labels[0] == 1, exact_masks(other)[0])})
    return scores


def same_place(pipe: Any, tasks: Sequence[Task], params: dict[str, Any], settings: Settings) -> Scores:
    """The point where it was: what finding nothing scores."""
    return [_apart(point, wanted) for _, _, point, wanted in _pairs(tasks)]


def points(pipe: Any, tasks: Sequence[Task], params: dict[str, Any], settings: Settings) -> Scores:
    """A point of an object of one rendered picture, found in another."""
    readout = ReadoutPipeline(pipe)
    return [
        _apart(readout.correspond(picture(task), point, picture(other), seed=task.seed, **params), wanted)
        for task, other, point, wanted in _pairs(tasks)
    ]


def _pairs(tasks: Sequence[Task]) -> list[tuple[Task, Task, tuple[float, float], tuple[float, float]]]:
    """Two pictures with one object in both, a point on it in the first and that point in the second, (x, y)."""
    found = []
    for i, task in enumerate(tasks):
        other = elsewhere(task, tasks[(i + 1) % len(tasks)])
        here, there = fitted(*task.layout.things[0]), fitted(*other.layout.things[0])
        rows, columns = np.nonzero(exact_masks(task)[0])
        at = int(np.random.default_rng(task.seed).integers(len(rows)))
        x, y = (columns[at] + 0.5) / 128, (rows[at] + 0.5) / 128
        scale = there.r / here.r
        wanted = there.cx + (x - here.cx) * scale, there.cy + (y - here.cy) * scale
        found.append((task, other, (float(x), float(y)), wanted))
    return found


def _apart(point: tuple[float, float], wanted: tuple[float, float]) -> dict[str, float]:
    distance = float(np.hypot(point[0] - wanted[0], point[1] - wanted[1]))
    return {"error": 128 * distance, "within": float(distance <= NEAR)}


Measure = Callable[[Any, Sequence[Task], dict[str, Any], Settings], Scores]
KINDS: dict[str, dict[str, Measure]] = {
    NONE: {"point": same_place},
    "segment": {"drawn": drawn, "given": given},
    "segment-like-me": {"example": like},
    "correspond": {"point": points},
}
"""What is measured of each method, by what its row is called besides."""


def measure(
    pipe: Any, specs: Sequence[Spec], objects: Sequence[int], images: int, settings: Settings, results: Results
) -> None:
    """Add the rows that `results` does not hold yet. Raises ControlError for methods that read nothing."""
    for spec in specs:
        if len(spec.parts) > 1 or _name(spec) not in KINDS:
            raise ControlError(f'"{spec.label}" reads no masks and no points: choose of {", ".join(KINDS)}.')
    for n in objects:
        tasks = make_tasks(n, images, settings.split, settings.seed)
        for spec in specs:
            for kind, scored in KINDS[_name(spec)].items():
                label = f"{spec.label}: {kind}"
                if results.find(label, n) is None:
                    results.add(_row(pipe, tasks, spec, label, scored, settings))


def _name(spec: Spec) -> str:
    return spec.parts[0].method.name if spec.parts else spec.label


def _row(pipe: Any, tasks: Sequence[Task], spec: Spec, label: str, scored: Measure, settings: Settings) -> Row:
    objects, start = len(tasks[0].layout.things), time.perf_counter()
    try:
        with torch.no_grad():
            scores = scored(pipe, tasks, spec.parts[0].params if spec.parts else {}, settings)
    except ControlError as error:
        return Row(label, objects, 0, error=str(error))
    seconds = (time.perf_counter() - start) / len(tasks)
    names = scores[0] if scores else {}
    metrics = {name: mean_interval([one[name] for one in scores]) for name in names}
    return Row(label, objects, len(scores), metrics, seconds)
