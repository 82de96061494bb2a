"""A method's parameters as the fields of a form, read from its dataclass; and back to a control."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass
from pathlib import Path
from typing import Any

from attnctrl.control import Control, Window
from attnctrl.controls import REGISTRY, Method, method
from attnctrl.errors import ControlError

LONGEST = 2000
_KINDS = {
    "float": "number",
    "int": "whole",
    "bool": "flag",
    "str": "text",
    "str | Sequence[str]": "text",
    "Sequence[str]": "words",
    "Mapping[str, float]": "weights",
    "tuple[int, int]": "sizes",
    "tuple[int, int, int]": "sizes",
    "tuple[int, int, int] | None": "sizes",
    "str | Path | Sequence[str | Head] | None": "heads",
}


@dataclass(frozen=True)
class Entry:
    """One field of a method's form.

    kind: "number", "whole", "flag", "choice", "text", "words", "weights", "sizes", "heads" or "file". low, high: range
    of a number. choices: of a choice. length: how many whole numbers "sizes" holds.
    """

    method: str
    name: str
    kind: str
    default: Any
    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple[Any, ...] = ()
    length: int = 0

    def read(self, value: Any) -> Any:
        """The parameter's value from what a form or a JSON request holds.

        Lists may be given as such or as text with commas, weights as a mapping or as "word=2, other=0.5".
        Raises ControlError for values of another type and for numbers out of range.
        """
        return getattr(self, f"_{self.kind}")(value)

    def write(self, value: Any) -> Any:
        """What a form shows for a parameter's value: text for everything but numbers, flags and choices."""
        if self.kind == "weights":
            return ", ".join(f"{word}={weight:g}" for word, weight in value.items())
        if self.kind in ("words", "sizes", "heads"):
            return ", ".join(":".join(map(str, one)) if isinstance(one, tuple) else str(one) for one in value or ())
        return value

    def _number(self, value: Any) -> float:
        number = _finite(value)
        if number is None:
            raise self._bad(value, "give a number")
        if (self.low is not None and number < self.low) or (self.high is not None and number > self.high):
            raise self._bad(value, f"it must be in [{self.low:g}, {self.high:g}]")
        return number

    def _whole(self, value: Any) -> int:
        number = self._number(value)
        if number != int(number):
            raise self._bad(value, "give a whole number")
        return int(number)

    def _flag(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise self._bad(value, "give true or false")
        return value

    def _choice(self, value: Any) -> Any:
        if value not in self.choices or isinstance(value, bool):
            raise self._bad(value, f"choose one of {', '.join(map(str, self.choices))}")
        return value

    def _text(self, value: Any) -> str:
        if not isinstance(value, str) or len(value) > LONGEST:
            raise self._bad(value, f"give a text of at most {LONGEST} characters")
        return value

    def _words(self, value: Any) -> tuple[str, ...]:
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list | tuple) or not all(isinstance(p, str) for p in parts) or len(parts) > LONGEST:
            raise self._bad(value, "give words, separated by commas")
        return tuple(p.strip() for p in parts if p.strip())

    def _weights(self, value: Any) -> dict[str, float]:
        if isinstance(value, Mapping):
            pairs = [*value.items()]
        else:
            pairs = [(word.strip(), number) for word, _, number in (p.rpartition("=") for p in self._words(value))]
        found = {word: _finite(number) for word, number in pairs}
        if not all(isinstance(word, str) and word for word in found) or None in found.values():
            raise self._bad(value, "write word=2, other=0.5")
        return found  # type: ignore[return-value]

    def _sizes(self, value: Any) -> tuple[int, ...] | None:
        if value is None or value == "":
            if self.default is None:
                return None
            raise self._bad(value, f"give {self.length} whole numbers")
        parts = value.split(",") if isinstance(value, str) else value
        numbers = [_finite(p) for p in parts] if isinstance(parts, list | tuple) else []
        whole = [int(n) for n in numbers if n is not None and n == int(n) and 0 < n <= 4096]
        if len(whole) != self.length or len(numbers) != self.length:
            raise self._bad(value, f"give {self.length} whole numbers from 1 to 4096, separated by commas")
        return tuple(whole)

    def _heads(self, value: Any) -> list[Any] | None:
        if value is None or value == "" or value == []:
            return None
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list | tuple) or len(parts) > LONGEST:
            raise self._bad(value, "write layers, or layer:head, separated by commas")
        texts = [":".join(map(str, p)) if isinstance(p, list | tuple) else str(p).strip() for p in parts]
        return [(t.rpartition(":")[0], int(t.rpartition(":")[2])) if re.search(r".:\d{1,4}$", t) else t for t in texts]

    def _file(self, value: Any) -> str:
        return self._text("" if value is None else value)

    def _bad(self, value: Any, wanted: str) -> ControlError:
        shown = repr(value)
        return ControlError(f"{self.method}: {self.name} is {shown[:60]}{'...' * (len(shown) > 60)}: {wanted}.")


def _finite(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def entries(of: Method) -> list[Entry]:
    """The fields of a method's form: its documented parameters, and its window last.

    Raises ControlError for a parameter of a type that no field can hold: then give `_KINDS` a rule for it.
    """
    found = [_entry(of.name, f) for f in of.params.values()]
    window: Any = of.control.__dataclass_fields__["window"].default
    for name, value, text in (("start", window.start, "begins"), ("end", window.end, "ends")):
        found.append(
            Entry(of.name, f"window_{name}", "number", value, f"part of the run at which the method {text}", 0.0, 1.0)
        )
    return found


def _entry(name: str, given: Field) -> Entry:
    factory: Any = given.default_factory
    default = given.default if given.default is not MISSING else factory()
    about, kind = given.metadata, str(given.type)
    common: dict[str, Any] = {"method": name, "name": given.name, "default": default, "help": about.get("help", "")}
    if about.get("choices"):
        return Entry(kind="choice", choices=tuple(about["choices"]), **common)
    if "PathLike" in kind:
        return Entry(kind="file", **common)
    if kind not in _KINDS:
        raise ControlError(f"{name}: no form field can hold {given.name} of type {kind}.")
    low, high = about.get("low"), about.get("high")
    return Entry(kind=_KINDS[kind], low=low, high=high, length=kind.count("int") * kind.startswith("tuple"), **common)


def paper_link(of: Method) -> str:
    """Where the method comes from, as Markdown: numbers of arXiv are links."""
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", of.control.paper)


def parameters(name: str, given: Any) -> dict[str, Any]:
    """The checked values of a method's form that differ from its defaults.

    Raises ControlError for unknown methods and parameters, and as `Entry.read` does.
    """
    known = {entry.name: entry for entry in entries(method(name))}
    if not isinstance(given, Mapping):
        raise ControlError(f"{name}: its parameters are {given!r:.60}: give names with values.")
    for parameter in given:
        if parameter not in known:
            raise ControlError(f'{name} has no parameter "{str(parameter)[:60]}": it has {", ".join(known)}.')
    values = {entry.name: entry.read(given[entry.name]) for entry in known.values() if entry.name in given}
    return {parameter: value for parameter, value in values.items() if value != known[parameter].default}


def arguments(name: str, given: Mapping[str, Any], subject: Mapping[str, Any], files: Mapping[str, Path]) -> dict:
    """What to call the class of a method with: checked parameters, the window as one, files by their path.

    subject: by the name of the field that takes it; left out where the method has none. files: what forms may name.
    Raises ControlError for files that are not among these.
    """
    of, found = method(name), dict(given)
    window: Any = of.control.__dataclass_fields__["window"].default
    edges = found.pop("window_start", window.start), found.pop("window_end", window.end)
    for entry in entries(of):
        if entry.kind == "file":
            chosen = found.get(entry.name, "")
            if chosen not in files:
                listed = ", ".join(files) or "none: the page was started without --file"
                raise ControlError(f'{name}: there is no file "{chosen[:60]}" for {entry.name}; known are {listed}.')
            found[entry.name] = str(files[chosen])
    if edges != (window.start, window.end):
        found["window"] = Window(*edges)
    return {**{k: v for k, v in subject.items() if k in of.settings}, **found}


def make(name: str, given: Mapping[str, Any], subject: Mapping[str, Any], files: Mapping[str, Path]) -> Control:
    """The control of a checked form. Raises ControlError as `arguments` and the control itself do."""
    return method(name).make(**arguments(name, given, subject, files))


def of_tasks(*tasks: str, kinds: set[str] | None = None) -> list[Method]:
    """The registered methods of these tasks; kinds: only those that act on one of these kinds of attention."""
    return [m for m in REGISTRY.values() if m.task in tasks and (kinds is None or kinds & {*m.where.kinds})]
