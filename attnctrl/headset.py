"""Sets of attention heads: what a search of heads found, saved and read again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from attnctrl.errors import ControlError

Head = tuple[str, int]
"""The site's name and the number of the head in it."""


@dataclass
class HeadSet:
    """heads: chosen, best first. rounds: of each round the candidates with their scores, best first. about: how the
    search was made, from the name of the model to the prompts."""

    heads: list[Head] = field(default_factory=list)
    rounds: list[list[tuple[Head, float]]] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """As JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> HeadSet:
        """Raises ControlError for files of another kind, FileNotFoundError where there is none."""
        try:
            given = json.loads(Path(path).read_text())
            heads = [(str(site), int(head)) for site, head in given["heads"]]
            rounds = [[((str(s), int(h)), float(score)) for (s, h), score in one] for one in given["rounds"]]
            return cls(heads, rounds, dict(given["about"]))
        except (ValueError, KeyError, TypeError):
            raise ControlError(f"{path} is no set of heads: give a file that attnctrl headhunt wrote.") from None


def load_heads(path: str | Path) -> Sequence[Head]:
    """The heads of a saved set."""
    return HeadSet.load(path).heads
