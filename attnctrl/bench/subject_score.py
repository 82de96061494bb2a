"""Whether each subject looks like its own picture: pure functions of what the detector found."""

from __future__ import annotations

import numpy as np

from attnctrl.bench.subject_tasks import SubjectTask
from attnctrl.shapes.detect import Detection, Found
from attnctrl.shapes.score import contains


def score_subjects(task: SubjectTask, found: Detection) -> dict[str, float]:
    """identity: share of the subjects of which there is an object of their shape and their reference's colour.
    blend: share of which there is one in another reference's colour (0 with one subject). prompt: share of the
    shapes, and the background, that the prompt names and the picture has. in_box: identity inside the subject's box.
    whole: 1 where every subject is right and nothing else is there.
    """
    asked = task.layout.asked
    right = [[o for o in found.objects if (o.shape, o.colour) == pair] for pair in asked]
    blends = [any(o.shape == s and o.colour != c and _of(o, asked) for o in found.objects) for s, c in asked]
    named = [any(o.shape == s for o in found.objects) for s, _ in asked] + [found.background == task.layout.background]
    boxed = [
        any(contains(box, o.centre) for o in objects) for objects, box in zip(right, task.layout.boxes, strict=True)
    ]
    return {
        "identity": sum(map(bool, right)) / len(asked),
        "blend": sum(blends) / len(asked),
        "prompt": sum(named) / len(named),
        "in_box": sum(boxed) / len(asked),
        "whole": float(all(right) and len(found.objects) == len(asked)),
    }


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """How far two pictures of bytes, (height, width, 3), are apart: the mean absolute difference, 0 to 1.

    Of two pictures of one task from different noise it is the `diversity` of a method: 0 where the noise says nothing.
    """
    return float(np.abs(one.astype(np.float64) - other).mean() / 255)


def _of(found: Found, asked: list[tuple[str, str]]) -> bool:
    return any(found.colour == colour for _, colour in asked)
