from __future__ import annotations

import pytest

from attnctrl.bench.methods import parse_methods
from attnctrl.control import Window
from attnctrl.controls import LoCo, RegionMask
from attnctrl.errors import ControlError
from attnctrl.regions import Region

REGIONS = [[Region("a red circle", box=(0.1, 0.1, 0.5, 0.5))]]
GIVEN = {"regions": REGIONS, "phrases": [["circle"]], "background": ["a gray background"]}


def test_parameters_take_the_kind_of_their_default() -> None:
    (spec,) = parse_methods(
        "loco{scale=60; iterations=3; squash=false; alpha=0; window=0.1..0.5; near=1/4}",
    )
    (loco,) = spec.controls(GIVEN)
    assert isinstance(loco, LoCo)
    assert (loco.scale, loco.iterations, loco.squash, loco.alpha) == (60.0, 3, False, 0.0)
    assert loco.window == Window(0.1, 0.5)
    assert loco.where.near == 0.25
    assert loco.where.kinds == ("cross", "self", "joint")
    assert loco.regions is REGIONS
    assert spec.label == "loco{scale=60;iterations=3;squash=false;alpha=0;window=0.1..0.5;near=1/4}"


def test_lists_sums_and_alternatives() -> None:
    specs = parse_methods("none, loco{scale=3|30;iterations=1|2}+region-mask,region-mask,none")
    assert [s.label for s in specs] == [
        "none",
        "loco{scale=3;iterations=1}+region-mask",
        "loco{scale=3;iterations=2}+region-mask",
        "loco{scale=30;iterations=1}+region-mask",
        "loco{scale=30;iterations=2}+region-mask",
        "region-mask",
    ]
    assert specs[0].parts == ()
    assert [type(c) for c in specs[1].controls(GIVEN)] == [LoCo, RegionMask]


def test_fidelity_methods_get_nouns() -> None:
    (spec,) = parse_methods("attend-excite{scale=5}")
    (found,) = spec.controls(GIVEN)
    assert found.phrases == [["circle"]]  # type: ignore[attr-defined]


def test_a_background_is_taken_where_a_method_has_one_and_nothing_else_was_asked() -> None:
    plain, other = parse_methods("regional-flux,regional-flux{background=a wall}")
    assert plain.controls(GIVEN)[0].background == ["a gray background"]  # type: ignore[attr-defined]
    assert other.controls(GIVEN)[0].background == "a wall"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no method"),
        ("lico", "choose one of"),
        ("loco{", "is not a method"),
        ("loco{scale}", "not of the form param=value"),
        ("loco{scale=}", "not of the form param=value"),
        ("loco{scale=big}", "give a number"),
        ("loco{iterations=2.5}", "whole number"),
        ("loco{squash=1}", "true or false"),
        ("loco{strength=1}", 'no parameter "strength"'),
        ("loco{scale=-1}", "must be in"),
        ("loco{window=0.5}", "not of the form"),
    ],
)
def test_what_makes_no_sense_is_refused(text: str, message: str) -> None:
    with pytest.raises(ControlError, match=message):
        parse_methods(text)
