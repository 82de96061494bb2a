"""Choosing methods: one list, and of each chosen method its form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from attnctrl.controls import Method
from attnctrl.fields import of_tasks
from attnctrl.ui.backend import Backend
from attnctrl.ui.forms import Form, draw_form
from attnctrl.ui.request import TASKS


@dataclass(frozen=True)
class Chooser:
    """The list of methods for a tab and the forms of all of them, of which those of the chosen ones are shown."""

    tab: str
    chosen: Any
    forms: list[Form]

    @property
    def inputs(self) -> list[Any]:
        """The list, then the components of every form."""
        return [self.chosen, *(component for form in self.forms for component in form.components)]

    @property
    def groups(self) -> list[Any]:
        return [form.group for form in self.forms]

    def methods(self, values: list[Any]) -> dict[str, dict[str, Any]]:
        """The chosen methods with the values of their forms, from the values of `inputs`."""
        names, rest = values[0] or [], values[1:]
        found: dict[str, dict[str, Any]] = {}
        start = 0
        for form in self.forms:
            stop = start + len(form.entries)
            found[form.method.name] = {e.name: v for e, v in zip(form.entries, rest[start:stop], strict=True)}
            start = stop
        return {name: found.get(name, {}) for name in names}

    def values(self, methods: Mapping[str, Mapping[str, Any]]) -> list[Any]:
        """What `inputs` show for these methods."""
        return [list(methods), *(v for form in self.forms for v in form.values(methods.get(form.method.name, {})))]

    def offered(self, chosen: list[str] | None, kinds: set[str]) -> Any:
        """The list for a model that has these kinds of attention: only methods that act on one of them."""
        methods = of_tasks(*TASKS[self.tab], kinds=kinds)
        known = [m.name for m in methods]
        return gr.update(choices=_choices(methods), value=[name for name in chosen or [] if name in known])

    def shown(self, names: list[str] | None) -> list[Any]:
        """Updates of `groups`."""
        return [gr.update(visible=form.method.name in (names or [])) for form in self.forms]


def draw_chooser(backend: Backend, tab: str, default: list[str], most: int | None = None) -> Chooser:
    """The methods for a tab, at first of every kind of model; default: those chosen at first; most: at once."""
    methods = of_tasks(*TASKS[tab])
    chosen = gr.Dropdown(
        _choices(methods),
        value=default,
        multiselect=True,
        max_choices=most,
        label="Method" if most == 1 else "Methods, in the order in which they act",
        elem_id=f"{tab}-methods",
    )
    chooser = Chooser(tab, chosen, [draw_form(m, backend.files) for m in methods])
    for form in chooser.forms:
        if form.method.name in default:
            form.group.visible = True
    chosen.change(chooser.shown, chosen, chooser.groups, show_progress="hidden", queue=False, api_visibility="private")
    return chooser


def _choices(methods: list[Method]) -> list[tuple[str, str]]:
    return [(f"{m.name}: {m.control.fixes}", m.name) for m in methods]
