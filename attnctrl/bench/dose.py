"""`bench dose`: one method at growing strength, on the tuning prompts. Too much of it breaks pictures."""

from __future__ import annotations

TABLE = ("present", "in_box", "iou", "bound", "background")
BOXES = True
IMAGES, QUICK_IMAGES = 48, 8
OBJECTS = (2,)
METHOD, PARAM, VALUES = "loco", "scale", "1,3,10,30,60,100,200"


def default_methods(method: str = METHOD, param: str = PARAM, values: str = VALUES) -> str:
    """The stock pipeline, then `method` once per value of its parameter `param` (comma-separated values)."""
    listed = "|".join(v.strip() for v in values.split(","))
    inside = f"{param}={listed}"
    if method.endswith("}"):
        return f"none,{method[:-1]};{inside}}}"
    return f"none,{method}{{{inside}}}"
