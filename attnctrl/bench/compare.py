"""Methods side by side: every method on the same prompts, boxes and seeds, judged picture by picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from tqdm import tqdm

from attnctrl.bench.draw import Settings, draw
from attnctrl.bench.methods import IDEAL, NONE, Spec
from attnctrl.bench.results import CHANGE, Results, Row
from attnctrl.bench.stats import Estimate, bootstrap_mean, mean_interval
from attnctrl.bench.tasks import Task, make_tasks
from attnctrl.errors import ControlError
from attnctrl.shapes.detect import detect
from attnctrl.shapes.score import score_image

SPLIT = ("present", "bound")
"""Measures that are also given apart for prompts of trained pairs and for those with a pair never trained, and as the
change against the stock pipeline."""


def judge(task: Task, picture: Any, boxes: bool) -> dict[str, float]:
    """Every measure of one picture as a number: shares in 0..1, yes and no as 1 and 0, `extra` as a count.

    boxes: whether the method was given the boxes, so that they count.
    """
    layout = task.layout
    score = score_image(layout.asked, detect(picture), layout.boxes if boxes else None, layout.background)
    return {name: float(value) for name, value in asdict(score).items() if value is not None}


def measure(pipe: Any, tasks: Sequence[Task], spec: Spec, settings: Settings, boxes: bool, bar: tqdm) -> Row:
    """One row: draw the tasks, judge the pictures. A method that cannot work gives a row that says why."""
    objects = len(tasks[0].layout.things)
    bar.set_description(f"{spec.label}, {objects} objects")
    seconds: float | None = None
    losses: list[float] = []
    try:
        if spec.label == IDEAL:
            pictures = [task.ideal for task in tasks]
            bar.update(len(tasks))
        else:
            drawn = draw(pipe, tasks, spec, settings, bar.update)
            pictures, seconds, losses = drawn.pictures, drawn.seconds_per_image, drawn.losses
    except ControlError as error:
        return Row(spec.label, objects, 0, error=str(error))
    scores = [judge(task, picture, boxes) for task, picture in zip(tasks, pictures, strict=True)]
    metrics = {name: mean_interval([s[name] for s in scores]) for name in scores[0]}
    for kind, held_out in (("common", False), ("held_out", True)):
        chosen = [s for s, task in zip(scores, tasks, strict=True) if task.held_out == held_out]
        metrics |= {f"{name}_{kind}": mean_interval([s[name] for s in chosen]) for name in SPLIT if chosen}
    if losses:
        metrics |= by_success(losses, [bool(s["bound"]) for s in scores])
    more = {"pictures": {name: " ".join(f"{s[name]:g}" for s in scores) for name in SPLIT}}
    return Row(spec.label, objects, len(tasks), metrics, seconds, more=more)


def by_success(losses: Sequence[float], success: Sequence[bool]) -> dict[str, Estimate]:
    """The mean loss of all pictures, of those with everything right, and of the others: a loss that is worth descending
    is lower in the former. A method with a very small step says so of the stock pictures."""
    found = {"loss": losses}
    found |= {
        name: [loss for loss, right in zip(losses, success, strict=True) if right == wanted]
        for name, wanted in (("loss_bound", True), ("loss_unbound", False))
    }
    return {name: bootstrap_mean(values) for name, values in found.items() if values}


def paired(row: Row, stock: Row | None) -> Row:
    """The row with the mean change of each measure of SPLIT, picture by picture, where the stock row is known.

    Much narrower than the intervals of the two rows: what the prompts and the noise decide is in both.
    """
    if stock is None or stock.method == row.method or "pictures" not in row.more or "pictures" not in stock.more:
        return row
    changes = {}
    for name in SPLIT:
        own, others = (map(float, each.more["pictures"][name].split()) for each in (row, stock))
        changes[name + CHANGE] = bootstrap_mean([a - b for a, b in zip(own, others, strict=True)])
    return replace(row, metrics={**row.metrics, **changes})


def compare(
    pipe: Any,
    specs: Sequence[Spec],
    objects: Sequence[int],
    images: int,
    settings: Settings,
    results: Results,
    boxes: bool,
) -> None:
    """Add a row for each method and number of objects that `results` does not hold yet."""
    wanted = [(n, spec) for n in objects for spec in specs]
    missing = [(n, spec) for n, spec in wanted if results.find(spec.label, n) is None]
    tasks = {n: make_tasks(n, images, settings.split, settings.seed) for n in {n for n, _ in missing}}
    if missing:
        # What the first call of a process pays for once is not the first method's cost.
        warm = tasks[missing[0][0]][: settings.batch]
        draw(pipe, warm, Spec(NONE), Settings(**{**asdict(settings), "steps": 2}))
    with tqdm(total=images * len(missing), unit="img", smoothing=0.1) as bar:
        for n, spec in missing:
            row = measure(pipe, tasks[n], spec, settings, boxes, bar)
            results.add(paired(row, results.find(NONE, n)))
