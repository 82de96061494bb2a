"""`bench fidelity`: without boxes, is everything there, in its own colour, and nothing else?

The controls get the nouns; the colours that belong to them they find in the prompt.
"""

from __future__ import annotations

from attnctrl.bench.methods import NONE
from attnctrl.controls import REGISTRY

TABLE = ("present", "bound", "bound_change", "extra", "neglected", "leaked")
BOXES = False
IMAGES, QUICK_IMAGES = 200, 12
OBJECTS = (2, 3, 4)


def default_methods() -> str:
    """The stock pipeline and every registered fidelity method."""
    return ",".join([NONE, *(m.name for m in REGISTRY.values() if m.task == "fidelity")])
