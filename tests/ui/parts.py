"""What the tests of the page share: one backend on the shipped model, and a layout that it draws in a moment."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from attnctrl.models import load_pipeline
from attnctrl.ui.backend import Backend
from attnctrl.ui.desk import Desk
from attnctrl.ui.jobs import Progress

PROMPT = "a red circle and a blue square"
LAYOUT: dict[str, Any] = {
    "task": "layout",
    "prompt": PROMPT,
    "regions": [
        {"phrase": "a red circle", "box": [0.05, 0.1, 0.45, 0.6]},
        {"phrase": "a blue square", "box": [0.55, 0.4, 0.95, 0.9]},
    ],
    "methods": {"region-mask": {}, "loco": {"scale": 20.0, "iterations": 1}},
    "seed": 1,
    "steps": 4,
    "guidance": 3.5,
}


@cache
def backend() -> Backend:
    return Backend("shapes-sd").open(lambda: load_pipeline("shapes-sd", device="cpu"))


def drawn(desk: Desk, request: Any, visitor: str = "me", each: Callable | None = None, pictures: Any = ()) -> Any:
    """The result of a run; each: told of every step."""
    for event in desk.run(request, visitor, pictures):
        if each is not None and isinstance(event, Progress):
            each(event)
    return event


def same(first: Any, second: Any) -> bool:
    return bool(np.array_equal(np.asarray(first), np.asarray(second)))
