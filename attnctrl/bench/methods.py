"""Methods as the command line writes them: `loco`, `loco{scale=60;iterations=3}`, `loco{scale=10|30}+region-mask`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from attnctrl.control import Control, Window
from attnctrl.controls import Method, method
from attnctrl.errors import ControlError
from attnctrl.processors import attention_kinds

NONE, IDEAL = "none", "ideal"
_PART = re.compile(r"([\w-]+)(?:\{([^{}]*)\})?")


@dataclass(frozen=True)
class Part:
    """A registered method and the parameters that differ from its defaults."""

    method: Method
    params: dict[str, Any] = field(default_factory=dict)

    def make(self, given: Mapping[str, Any]) -> Control:
        """The control for a batch: of what is `given` (`tasks.given`) it takes the fields that it has."""
        known = {f.name for f in fields(self.method.control)}
        return self.method.make(**{k: v for k, v in given.items() if k in known} | self.params)


@dataclass(frozen=True)
class Spec:
    """One row's method: the label it was written as, and its parts in order.

    Two have no parts: `none`, the stock pipeline, and `ideal`, what was asked drawn exactly, the best score there is.
    """

    label: str
    parts: tuple[Part, ...] = ()

    def fits(self, pipe: Any) -> bool:
        """Whether the pipeline has attention of a kind that each part acts on."""
        kinds = attention_kinds(pipe)
        return all(kinds & {*part.params.get("where", part.method.where).kinds} for part in self.parts)

    def controls(self, given: Mapping[str, Any]) -> list[Control]:
        return [part.make(given) for part in self.parts]


def parse_methods(text: str) -> list[Spec]:
    """The methods of a comma-separated list.

    Each is `none`, `ideal`, or registered names joined by `+`, each with optional `{param=value;...}`. A value with
    bars, `scale=10|30|60`, stands for one method per value. Besides the method's parameters, `window=0.1..0.5` sets
    its part of the noise schedule and `near=1/16` the maps that it reads, by their share of
    the latents' tokens.

    Raises:
        ControlError: a name, a parameter or a value is not one of the method's.
    """
    specs = [spec for item in split_list(text) for spec in _expand(item)]
    if not specs:
        raise ControlError(f'"{text}" names no method.')
    return list({spec.label: spec for spec in specs}.values())


def split_list(text: str) -> list[str]:
    """The items of a list with commas, of which those inside braces are not the list's."""
    return [item for part in split_outside(text, ",") if (item := part.strip())]


def split_outside(text: str, mark: str) -> list[str]:
    """The text cut at every `mark` that is not inside braces."""
    return re.split(re.escape(mark) + r"(?![^{]*\})", text)


def _expand(text: str) -> list[Spec]:
    if text in (NONE, IDEAL):
        return [Spec(text)]
    pieces = split_outside(text, "+")
    return [
        Spec("+".join(label for label, _ in chosen), tuple(part for _, part in chosen))
        for chosen in itertools.product(*(_alternatives(piece.strip()) for piece in pieces))
    ]


def _alternatives(text: str) -> list[tuple[str, Part]]:
    """One (label, part) for each combination of the values that `text` lists."""
    match = _PART.fullmatch(text)
    if match is None:
        raise ControlError(f'"{text}" is not a method: write name or name{{param=value;param=value}}.')
    chosen = method(match[1])
    pairs = []
    for assignment in filter(None, (a.strip() for a in (match[2] or "").split(";"))):
        name, equals, values = (s.strip() for s in assignment.partition("="))
        if not equals or not values:
            raise ControlError(f'"{assignment}" in "{text}" is not of the form param=value.')
        pairs.append([(name, value.strip()) for value in values.split("|")])
    result = []
    for row in itertools.product(*pairs):
        inside = ";".join(f"{name}={value}" for name, value in row)
        part = Part(chosen, _params(chosen, row))
        part.make({})  # the control itself checks names and ranges
        result.append((f"{chosen.name}{{{inside}}}" if inside else chosen.name, part))
    return result


def _params(chosen: Method, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    defaults: dict[str, Any] = {f.name: f.default for f in fields(chosen.control)}
    params: dict[str, Any] = {}
    for name, text in pairs:
        if name == "window":
            params[name] = _window(text)
        elif name == "near":
            params["where"] = replace(defaults["where"], near=None if text == NONE else _fraction(name, text))
        else:
            params[name] = _value(name, text, defaults.get(name))
    return params


def _window(text: str) -> Window:
    start, dots, end = text.partition("..")
    if not dots:
        raise ControlError(f'window "{text}" is not of the form 0.1..0.5.')
    return Window(_number("window", start), _number("window", end))


def _value(name: str, text: str, default: Any) -> Any:
    """`text` as a value of the kind that the parameter's default is."""
    if isinstance(default, bool):
        if text.lower() not in ("true", "false"):
            raise ControlError(f'{name} is "{text}": choose true or false.')
        return text.lower() == "true"
    if isinstance(default, str):
        return text
    number = _number(name, text)
    if isinstance(default, int) and not number.is_integer():
        raise ControlError(f"{name} is {text}: give a whole number.")
    return int(number) if isinstance(default, int) else number


def _fraction(name: str, text: str) -> float:
    above, _, below = text.partition("/")
    return _number(name, above) / _number(name, below or "1")


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ControlError(f'{name} is "{text}": give a number.') from None
