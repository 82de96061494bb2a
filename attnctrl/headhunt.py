"""HeadHunter: which attention heads to perturb, searched for any model and any objective."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attnctrl.controls import SoftPAG
from attnctrl.controls.guidance.common import OWN
from attnctrl.errors import ControlError
from attnctrl.headset import Head, HeadSet
from attnctrl.models import call_arguments
from attnctrl.processors import family_of
from attnctrl.run import control


@dataclass(frozen=True)
class Query:
    """A picture to draw for the search. asked: (shape, colour) of its objects, on the shapes world."""

    prompt: str
    seed: int
    asked: tuple[tuple[str, str], ...] | None = None


Objective = Callable[[np.ndarray, Query], float]
"""How good a picture is, (height, width, 3) in 0..1: more is better."""


def well_formed(picture: np.ndarray, query: Query) -> float:
    """The share of the objects asked for that are there, with their shape and colour."""
    from attnctrl.shapes.detect import detect
    from attnctrl.shapes.score import present

    return present(_asked(query), detect(picture))


def all_bound(picture: np.ndarray, query: Query) -> float:
    """1 where every object asked for is there with its own colour and nothing else is, else 0."""
    from attnctrl.shapes.detect import detect
    from attnctrl.shapes.score import bound

    return float(bound(_asked(query), detect(picture)))


OBJECTIVES: dict[str, Objective] = {"well-formed": well_formed, "bound": all_bound}
"""The built-in ones, for the shapes world."""


def _asked(query: Query) -> tuple[tuple[str, str], ...]:
    if query.asked is None:
        raise ControlError(
            f"the objectives {' and '.join(OBJECTIVES)} score scenes of the shapes world, not the prompt "
            f'"{query.prompt}": give a function of your own, or no prompt.'
        )
    return query.asked


def objective_of(name: str) -> Objective:
    """A built-in objective, or `module:function` or `file.py:function`, called with (picture, prompt).

    Raises ControlError where there is none of that name.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    place, colon, function = name.rpartition(":")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place or name)
        found = getattr(module, function if colon else "")
    except (ImportError, AttributeError, FileNotFoundError) as error:
        raise ControlError(
            f'objective "{name}" is unknown: choose {", ".join(OBJECTIVES)}, module:function or file.py:function.'
        ) from error
    return lambda picture, query: float(found(picture, query.prompt))


def candidates(pipe: Any, layers: Sequence[str] = ()) -> list[Head]:
    """All heads of the layers in which latents see latents, in the order of the forward pass.

    layers: keep those of these names or below these paths; () for all. Raises ControlError when none is left.
    """
    sites = [(site, module) for site, module in family_of(pipe).sites() if site.kind in OWN]
    kept = [
        (site.name, head)
        for site, module in sorted(sites, key=lambda pair: (pair[0].expert, pair[0].order))
        if not layers or any(site.name == name or site.name.startswith(f"{name}.") for name in layers)
        for head in range(module.heads)
    ]
    if not kept:
        known = ", ".join(site.name for site, _ in sites) or "none"
        raise ControlError(f"no head to choose from in {', '.join(layers) or 'this model'}: the layers are {known}.")
    return kept


def hunt(
    score: Callable[[tuple[Head, ...]], float],
    heads: Sequence[Head],
    rounds: int,
    keep: int,
    found: HeadSet | None = None,
    after_round: Callable[[HeadSet], None] = lambda found: None,
) -> HeadSet:
    """HeadHunter (Ahn et al., arXiv 2506.10978, algorithm 1).

    Each round scores the set of the heads chosen so far with one more of `heads`, for every one that is left, and the
    `keep` best join the set. Of equal scores the earlier head wins. found: a search to go on with. after_round: told
    the set after each round. Costs about rounds * len(heads) scores.
    """
    found = HeadSet() if found is None else found
    while len(found.rounds) < rounds:
        left = [head for head in heads if head not in found.heads]
        if not left:
            break
        chosen = tuple(found.heads)
        ranking = sorted(((head, score((*chosen, head))) for head in left), key=lambda pair: -pair[1])
        found.rounds.append(ranking)
        found.heads += [head for head, _ in ranking[:keep]]
        after_round(found)
    return found


def scorer(
    pipe: Any, queries: Sequence[Query], objective: Objective, params: dict[str, Any], call: dict[str, Any], batch: int
) -> Callable[[tuple[Head, ...]], float]:
    """The mean of an objective over pictures drawn with SoftPAG on a set of heads.

    params: further parameters of SoftPAG. call: arguments of the pipeline's call, with `guidance` as in
    `call_arguments`. batch: pictures per call.
    """
    given = {k: v for k, v in call.items() if k != "guidance"}

    def score(heads: tuple[Head, ...]) -> float:
        values: list[float] = []
        for first in range(0, len(queries), batch):
            some = queries[first : first + batch]
            # Drawn on the CPU: the same noise on every device.
            seeds = {"generator": [torch.Generator().manual_seed(query.seed) for query in some]}
            arguments = call_arguments(pipe, [q.prompt for q in some], call.get("guidance"), {**seeds, **given})
            with control(pipe, SoftPAG(heads, **params), record=False):
                pictures = pipe(**{**arguments, "output_type": "np"}).images
            values += [objective(picture, query) for picture, query in zip(pictures, some, strict=True)]
        return sum(values) / len(values)

    return score
