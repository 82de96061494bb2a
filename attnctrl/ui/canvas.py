"""A canvas on which regions are drawn, each tied to words of the prompt: our own component, no build step."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

_HERE = Path(__file__).parent
SIDE = 640


def draw_canvas(elem_id: str, hint: str, **props: Any) -> gr.HTML:
    """The canvas; its value is JSON text for `request.read_places`, untrusted like any other.

    props: see `scene` and `backdrop`, which make updates of it.
    """
    return gr.HTML(
        "[]",
        html_template=(_HERE / "canvas.html").read_text(),
        css_template=(_HERE / "canvas.css").read_text(),
        js_on_load=(_HERE / "canvas.js").read_text(),
        apply_default_css=False,
        elem_id=elem_id,
        hint=hint,
        **{"prompt": "", "words": [], "picture": "", "shape": [1, 1], **props},
    )


def scene(prompt: str, words: list[tuple[int, int]]) -> dict[str, Any]:
    """The prompt and where its words stand in it."""
    return {"prompt": prompt, "words": [list(one) for one in words]}


def backdrop(picture: Image.Image | None) -> dict[str, Any]:
    """What to draw on."""
    if picture is None:
        return {"picture": "", "shape": [1, 1]}
    small, packed = picture.convert("RGB"), BytesIO()
    small.thumbnail((SIDE, SIDE))
    small.save(packed, "JPEG", quality=90)
    data = base64.b64encode(packed.getvalue()).decode()
    return {"picture": f"data:image/jpeg;base64,{data}", "shape": list(picture.size)}
