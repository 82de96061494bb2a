"""`bench layout`: does each object stand, with its shape and colour, where its box is?"""

from __future__ import annotations

from attnctrl.bench.methods import IDEAL, NONE
from attnctrl.controls import REGISTRY

TABLE = ("present", "in_box", "iou", "bound")
BOXES = True
IMAGES, QUICK_IMAGES = 200, 8
OBJECTS = (2, 3, 4)
GUIDED_THEN_MASKED = "layout-guidance{near=none;scale=140}+region-mask{window=0.3..1}"
"""Gradients put the objects in place early on, a mask keeps them in their boxes afterwards."""


def default_methods() -> str:
    """The stock pipeline, every registered layout method, a loss followed by a mask, and the best score there is."""
    names = [m.name for m in REGISTRY.values() if m.task == "layout"]
    return ",".join([NONE, *names, GUIDED_THEN_MASKED, IDEAL])
