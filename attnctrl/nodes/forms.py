"""Nodes as data: what a node is called, takes and gives, whichever schema draws it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from attnctrl.controls import Method
from attnctrl.fields import Entry, entries

REGIONS, WORDS, MAPS = "ATTNCTRL_REGIONS", "ATTNCTRL_WORDS", "ATTNCTRL_MAPS"
PIPELINE, METHODS, SUBJECTS, LAYERS = "ATTNCTRL_PIPELINE", "ATTNCTRL_METHODS", "ATTNCTRL_SUBJECTS", "ATTNCTRL_LAYERS"
WIDGETS = ("FLOAT", "INT", "BOOLEAN", "COMBO", "STRING")
WIDEST = 1_000_000
"""The range of numbers that have none: without one, the page would take 0 to 2048."""


@dataclass(frozen=True)
class Port:
    """One input or output. kind: ComfyUI's name of its type. low, high, step: of numbers; lines: of a large text."""

    name: str
    kind: str
    help: str = ""
    default: Any = None
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    optional: bool = False
    lines: bool = False

    @property
    def widget(self) -> bool:
        return self.kind in WIDGETS


@dataclass(frozen=True)
class Node:
    """One node. run: takes the inputs by name, and of the host what `needs` names; returns the outputs in order.

    method: the registered method that it offers, native or for pipelines.
    """

    id: str
    title: str
    category: str
    about: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    run: Callable[..., tuple[Any, ...]]
    needs: tuple[str, ...] = ()
    method: str = ""


def model_port() -> Port:
    return Port("model", "MODEL", "a model that ComfyUI loaded")


def regions_port(optional: bool = False) -> Port:
    return Port("regions", REGIONS, "from the node Region", optional=optional)


def words_port(optional: bool = False) -> Port:
    return Port("words", WORDS, "from the node Prompt with words, which the sampler gets too", optional=optional)


def number(name: str, default: float, low: float, high: float, text: str) -> Port:
    """A number; whole where its default is."""
    return Port(name, "INT" if isinstance(default, int) else "FLOAT", text, default, low, high)


def text(name: str, default: str = "", about: str = "", lines: bool = False) -> Port:
    return Port(name, "STRING", about, default, lines=lines)


def form(of: Method) -> tuple[Port, ...]:
    """The ports of a method's parameters, from the registry; their values go to `attnctrl.fields.parameters`."""
    return tuple(_port(entry) for entry in entries(of))


def _port(entry: Entry) -> Port:
    default = entry.write(entry.default)
    if entry.kind in ("number", "whole"):
        kind = "INT" if entry.kind == "whole" else "FLOAT"
        low, high = (-WIDEST if entry.low is None else entry.low), (WIDEST if entry.high is None else entry.high)
        return Port(entry.name, kind, entry.help, default, low, high)
    if entry.kind == "flag":
        return Port(entry.name, "BOOLEAN", entry.help, default)
    if entry.kind == "choice":
        # Choices of numbers are text in a list, and numbers again where they are read.
        return Port(entry.name, "COMBO", entry.help, str(default), choices=tuple(map(str, entry.choices)))
    hints = {
        "words": "words, separated by commas",
        "weights": "word=2, other=0.5",
        "file": "a file of the input folder",
    }
    return Port(entry.name, "STRING", entry.help or hints.get(entry.kind, ""), default or "")


def read(of: Method, given: dict[str, Any]) -> dict[str, Any]:
    """What a node's ports hold as what `attnctrl.fields.parameters` reads."""
    numbers = {e.name: {str(c): c for c in e.choices} for e in entries(of) if e.kind == "choice"}
    return {name: numbers.get(name, {}).get(value, value) for name, value in given.items()}
