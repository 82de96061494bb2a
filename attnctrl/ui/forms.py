"""The fields of a method's form as Gradio components."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from attnctrl.controls import Method
from attnctrl.fields import Entry, entries, paper_link

SLIDER, STEP = 20, 0.01
"""Ranges up to this wide are sliders, of this step."""


@dataclass(frozen=True)
class Form:
    """One method's form; group holds its components, which stand in the order of the entries."""

    method: Method
    entries: list[Entry]
    group: gr.Group
    components: list[Any]

    def values(self, given: Mapping[str, Any]) -> list[Any]:
        """What the components show for these parameters, or for the defaults."""
        return [entry.write(given.get(entry.name, entry.default)) for entry in self.entries]


def draw_form(of: Method, files: Iterable[str]) -> Form:
    """Draw a method's form, hidden until the method is chosen."""
    fields = entries(of)
    with gr.Group(visible=False) as group:
        gr.Markdown(f"**{of.name}**: {of.control.fixes} ({paper_link(of)})", elem_classes="method-title")
        with gr.Row(elem_classes="fields"):
            components = [component(entry, files) for entry in fields]
    return Form(of, fields, group, components)


def component(entry: Entry, files: Iterable[str] = ()) -> Any:
    """The component of one field, which holds its range, choices and help."""
    common: dict[str, Any] = {
        "label": entry.name.replace("_", " "),
        "info": entry.help,
        "value": entry.write(entry.default),
    }
    if entry.kind == "flag":
        return gr.Checkbox(**common)
    if entry.kind == "choice":
        return gr.Dropdown([(str(c), c) for c in entry.choices], **common)
    if entry.kind == "file":
        return gr.Dropdown(["", *files], **common)
    if entry.kind in ("number", "whole"):
        return _number(entry, common)
    return gr.Textbox(**{**common, "info": entry.help or _HINTS.get(entry.kind, "")}, max_length=2000)


_HINTS = {
    "words": "words, separated by commas",
    "weights": "word=2, other=0.5",
    "sizes": "whole numbers, separated by commas; empty: chosen by the method",
    "heads": "layers or layer:head, separated by commas; empty: chosen by the method",
}


def _number(entry: Entry, common: dict[str, Any]) -> Any:
    whole = entry.kind == "whole"
    low, high, step = entry.low, entry.high, 1 if whole else STEP
    if low is not None and high is not None and high - low <= SLIDER and _on_grid(entry.default - low, step):
        return gr.Slider(low, high, step=step, **common)
    common["info"] += "" if low is None or high is None else f" [{low:g} to {high:g}]"
    return gr.Number(minimum=low, maximum=high, precision=0 if whole else None, step=1 if whole else 0.1, **common)


def _on_grid(value: float, step: float) -> bool:
    """Whether a slider can stand at the value; it would move to the nearest it can, unasked."""
    return abs(value / step - round(value / step)) < 1e-6
