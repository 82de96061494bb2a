"""Windows, sites and the table of points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attnctrl as ac
from attnctrl.control import POINTS, param
from attnctrl.sites import Site, Step
from tests.probes import Attend, Guide, Inputs, Mask, Nudge, Token

LATENTS = (1, 64, 64)


def sites() -> list[Site]:
    """A model of three levels: self- and cross-attention at each, on the way down and up."""
    found = []
    for block, depth in (("down", 0), ("down", 1), ("down", 2), ("mid", 2), ("up", 2), ("up", 1), ("up", 0)):
        for kind in ("self", "cross"):
            found.append(Site(f"{block}.{depth}.{kind}", kind, block, len(found), depth))
    return found


@pytest.mark.parametrize(
    ("where", "names"),
    [
        (ac.Where(blocks=("mid",)), ["mid.2.cross"]),
        (ac.Where(kinds=("self",), blocks=("mid", "up"), max_tokens=1024), ["mid.2.self", "up.2.self", "up.1.self"]),
        (ac.Where(near=1 / 16), ["down.2.cross", "mid.2.cross", "up.2.cross"]),
        (ac.Where(near=0.36), ["down.1.cross", "up.1.cross"]),
        (ac.Where(near=1000), ["down.0.cross", "up.0.cross"]),
        (ac.Where(near=1, max_tokens=1024), ["down.1.cross", "up.1.cross"]),
        (ac.Where(kinds=("joint",)), []),
        (ac.Where(max_tokens=10), []),
    ],
)
def test_where(where: ac.Where, names: list[str]) -> None:
    assert [site.name for site in where.select(sites(), LATENTS)] == names


def test_near_is_a_ratio() -> None:
    """Of 64 and 1024 tokens, 400 is nearer to 1024 (a factor of 2.6, not 6.3), though not by difference."""
    two = [Site("a", "cross", "down", 0, 0), Site("b", "cross", "down", 1, 2)]
    assert [s.name for s in ac.Where(near=400 / 1024).select(two, (1, 32, 32))] == ["a"]
    assert [s.name for s in ac.Where(near=200 / 1024).select(two, (1, 32, 32))] == ["b"]


@given(st.integers(1, 4), st.integers(1, 99), st.integers(1, 99), st.integers(0, 4))
def test_the_grid_of_a_site_halves_and_rounds_up(frames: int, height: int, width: int, depth: int) -> None:
    grid = Site("a", "cross", "down", 0, depth).grid((frames, height, width))
    assert grid == (frames, -(-height // 2**depth), -(-width // 2**depth))


def test_windows() -> None:
    window = ac.Window(0.25, 0.5)
    assert [p in window for p in (0.0, 0.2499, 0.25, 0.4999, 0.5, 1.0)] == [False, False, True, True, False, False]
    assert ac.Window(0.3, 0.3).empty
    assert not ac.Window().empty
    for start, end in ((-0.1, 1), (0, 1.1), (0.6, 0.5), (float("nan"), 1)):
        with pytest.raises(ac.ControlError, match="is not a part of the run"):
            ac.Window(start, end)


def test_progress_is_a_fraction_of_the_schedule() -> None:
    assert Step(15, 50, 700.0, 0.7).progress == 0.3
    assert Step(0, 0, 0.0, 0.0).progress == 0.0


def test_points_are_found_by_looking_at_the_class() -> None:
    assert ac.Control().points() == ()
    expected = {Attend: "attend", Guide: "guide", Inputs: "inputs", Mask: "mask", Nudge: "latents", Token: "loss"}
    for kind, point in expected.items():
        assert kind().points() == (point,)
    assert ac.DenseDiffusion().points() == ("context", "scores")
    assert len(set(POINTS)) == 11


def test_the_base_control_does_nothing() -> None:
    base, tensor, none = ac.Control(), torch.ones(1), Any
    for point in ("context", "inputs", "scores", "probs", "output", "noise", "latents"):
        method = getattr(base, point)
        arguments = [tensor, none, none][: method.__code__.co_argcount - 1]
        assert method(*arguments) is tensor
    assert base.mask(none, none) is None
    assert base.attend(none, none) is None
    assert base.descent(none) is None
    assert not base.idle
    assert ac.Control(window=ac.Window(1.0, 1.0)).idle


@dataclass(frozen=True)
class Sample(ac.Control):
    strength: float = param(0.5, "how much", 0, 1)
    count: int | None = param(None, "how many, or all", 1, 9)
    mode: str = param("soft", "which way", choices=("soft", "hard"))


def test_parameters_check_themselves() -> None:
    Sample(strength=1.0, count=9, mode="hard")
    for wrong in ({"strength": 1.01}, {"strength": float("nan")}, {"count": 0}):
        (name,) = wrong
        with pytest.raises(ac.ControlError, match=rf"Sample: {name} is .*: it must be in \["):
            Sample(**wrong)
    with pytest.raises(ac.ControlError, match=r"Sample: mode is 'odd': choose one of soft, hard\."):
        Sample(mode="odd")


def test_controls_are_values() -> None:
    assert Sample() == Sample()
    assert hash(Sample()) == hash(Sample())
    with pytest.raises(AttributeError):
        Sample().strength = 1.0  # type: ignore[misc]
