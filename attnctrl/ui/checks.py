"""Values of JSON data of any origin, checked one by one: each function raises ControlError, naming what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attnctrl.errors import ControlError

PHRASE = 200
"""Most characters of a phrase."""


def listed(given: Any, name: str, most: int) -> list[Any]:
    """A list of at most so many items."""
    if not isinstance(given, list | tuple):
        raise ControlError(f"{name}: found {given!r:.60}, give a list.")
    if len(given) > most:
        raise ControlError(f"{name}: found {len(given)}, give at most {most}.")
    return [*given]


def text(given: Mapping[str, Any], name: str, most: int) -> str:
    """The text called `name`, empty where there is none."""
    found = given.get(name, "")
    if not isinstance(found, str):
        raise ControlError(f"{name} is {found!r:.60}: give a text.")
    if len(found) > most:
        raise ControlError(f"{name} has {len(found)} characters: give at most {most}.")
    return found


def phrase(given: Any) -> str:
    """A phrase without spaces around it."""
    if not isinstance(given, str) or not given.strip() or len(given) > PHRASE:
        raise ControlError(f"the phrase {given!r:.60} is none: give 1 to {PHRASE} characters.")
    return given.strip()


def number(given: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    """The number called `name`, in [low, high]."""
    value = given.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ControlError(f"{name} is {value!r:.60}: give a number from {low:g} to {high:g}.")
    return float(value)


def whole(given: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    """The whole number called `name`, in [low, high]."""
    value = given.get(name, default)
    real = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not real or not low <= value <= high:
        raise ControlError(f"{name} is {value!r:.60}: give a whole number from {low} to {high}.")
    return int(value)
