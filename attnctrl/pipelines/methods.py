"""Methods by name as the controls of a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from attnctrl.control import Control
from attnctrl.controls import Method, method
from attnctrl.errors import ControlError

Methods: TypeAlias = str | Control | Sequence[str | Control] | Mapping[str, Mapping[str, Any]]
"""A name, a control, several of them, or names with the parameters of each."""
FREE = ("window", "where")
ANY_TASK = "guidance"
"""Methods of this task go with every other."""


def make_controls(
    methods: Methods,
    task: str | tuple[str, ...],
    subject: Mapping[str, Any],
    overrides: Mapping[str, Any],
) -> list[Control]:
    """The controls that `methods` names, each with its share of `overrides`.

    methods: names, controls, or names with the parameters of each, which win.
    task: what the methods must be for, or several such; those of guidance always fit. subject: what the task is about,
    by the name of the field that takes it; a method without such a field does not need it. With several methods a
    parameter must belong to exactly one of them.
    Raises ControlError otherwise.
    """
    given = [methods] if isinstance(methods, str | Control) else list(methods)
    named = [_of_task(m, task) for m in given if isinstance(m, str) and m != "none"]
    known = {m.name: {*m.settings, *FREE} - {*subject} for m in named}
    for parameter in overrides:
        owners = [name for name, parameters in known.items() if parameter in parameters]
        if len(owners) > 1:
            raise ControlError(
                f'parameter "{parameter}" belongs to {" and ".join(owners)}: make the controls yourself and pass them '
                "as method=[...]."
            )
        if not owners:
            names = ", ".join(known) or "no method"
            listed = ", ".join(sorted({p for ps in known.values() for p in ps} - {*FREE})) or "none"
            raise ControlError(f'"{parameter}" is no parameter of {names} nor of the pipeline: known are {listed}.')
    made: list[Control] = []
    for item in given:
        if isinstance(item, Control):
            made.append(item)
        elif item != "none":
            chosen = _of_task(item, task)
            own = {k: v for k, v in overrides.items() if k in known[chosen.name]}
            own |= methods[item] if isinstance(methods, Mapping) else {}
            made.append(chosen.make(**{k: v for k, v in subject.items() if k in chosen.settings}, **own))
    return made


def _of_task(name: str, task: str | tuple[str, ...]) -> Method:
    found, tasks = method(name), (task,) if isinstance(task, str) else task
    if found.task not in (*tasks, ANY_TASK):
        raise ControlError(f'method "{name}" belongs to the task {found.task}, not to {" or ".join(tasks)}.')
    return found
