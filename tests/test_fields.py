"""Forms from the registry: one for every method, holding its ranges, and back to the control."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import gradio as gr
import pytest

import attnctrl as ac
from attnctrl.control import Control, param
from attnctrl.controls import REGISTRY, Method, method
from attnctrl.errors import ControlError
from attnctrl.fields import Entry, arguments, entries, make, of_tasks, paper_link, parameters
from attnctrl.ui.app import build_app
from attnctrl.ui.backend import Backend
from attnctrl.ui.forms import component, draw_form
from attnctrl.ui.request import TASKS

REGIONS = [ac.Region("a cat", box=(0.0, 0.0, 0.5, 1.0))]


def test_every_method_has_its_form_in_the_page() -> None:
    """Each in every tab that offers its task; the page is drawn before its model is there."""
    page = build_app(Backend("shapes-sd"))
    drawn = Counter(str(one.value) for one in page.blocks.values() if isinstance(one, gr.Markdown))
    for of in REGISTRY.values():
        tabs = [tab for tab, tasks in TASKS.items() if of.task in tasks]
        titles = sum(count for text, count in drawn.items() if text.startswith(f"**{of.name}**: "))
        assert titles == len(tabs) > 0, of.name
    offered = {
        value
        for one in page.blocks.values()
        if isinstance(one, gr.Dropdown) and one.multiselect
        for _, value in one.choices
    }
    assert offered == {*REGISTRY}


@pytest.mark.parametrize("name", REGISTRY)
def test_every_method_has_its_form(name: str) -> None:
    """Each parameter is a component that shows the default, within the range, and gives it back."""
    of = method(name)
    fields = entries(of)
    assert {*of.params} <= {e.name for e in fields}
    with gr.Blocks():
        form = draw_form(of, ["plan.json"])
    assert len(form.components) == len(fields)
    for entry, drawn, value in zip(fields, form.components, form.values({}), strict=True):
        # What the browser sends back unchanged is the default: nothing is set unasked.
        assert entry.read(drawn.preprocess(drawn.postprocess(value))) == entry.default, entry.name
        if isinstance(drawn, gr.Slider | gr.Number):
            assert (drawn.minimum, drawn.maximum) == (entry.low, entry.high)
            assert entry.help


@dataclass(frozen=True)
class Strange(Control):
    """A method with a parameter of a type that no field can hold."""

    paper: ClassVar[str] = "none"
    curve: complex = param(1j, "a number off the line")


def test_a_parameter_that_no_field_can_hold_is_an_error() -> None:
    with pytest.raises(ControlError, match="strange: no form field can hold curve of type complex"):
        entries(Method("strange", Strange, "layout"))


def test_what_a_tab_offers_acts_on_the_model() -> None:
    names = {m.name for m in of_tasks(*TASKS["layout"], kinds={"cross", "self"})}
    assert "loco" in names
    assert "eligen" not in names, "it acts on joint attention only"
    assert "prompt-to-prompt" not in names


def test_papers_are_links() -> None:
    assert paper_link(method("loco")) == "[arXiv 2311.12342](https://arxiv.org/abs/2311.12342)"
    assert paper_link(method("inpaint-fusion")).count("https://arxiv.org/abs/") == 2
    assert paper_link(method("semantic-cfg")) == "CVPR 2024, S-CFG"


@pytest.mark.parametrize(
    ("name", "field", "value", "read"),
    [
        ("loco", "scale", 20, 20.0),
        ("loco", "iterations", 2.0, 2),
        ("radial", "block", 64, 64),
        ("sliding-tile", "tile", "2, 4,4", (2, 4, 4)),
        ("sliding-tile", "tile", "", None),
        ("vmoba", "area", [2, 5], (2, 5)),
        ("prompt-to-prompt", "blend", "cat, dog", ("cat", "dog")),
        ("prompt-to-prompt", "reweight", "red=2, big cat=0.5", {"red": 2.0, "big cat": 0.5}),
        ("prompt-to-prompt", "reweight", {"red": 2}, {"red": 2.0}),
        ("soft-pag", "heads", "mid_block, up.1:3", ["mid_block", ("up.1", 3)]),
        ("soft-pag", "heads", [["up.1", 3]], [("up.1", 3)]),
    ],
)
def test_values_are_read_from_forms_and_json(name: str, field: str, value: Any, read: Any) -> None:
    assert parameters(name, {field: value}) == ({} if read is None else {field: read})


@pytest.mark.parametrize(
    ("name", "given", "sentence"),
    [
        ("loco", {"scale": 1001}, "loco: scale is 1001: it must be in [0, 1000]."),
        ("loco", {"scale": float("nan")}, "loco: scale is nan: give a number."),
        ("loco", {"scale": "much"}, "loco: scale is 'much': give a number."),
        ("loco", {"scale": True}, "loco: scale is True: give a number."),
        ("loco", {"iterations": 2.5}, "loco: iterations is 2.5: give a whole number."),
        ("loco", {"sharpen": 1}, "loco: sharpen is 1: give true or false."),
        ("loco", {"speed": 1}, 'loco has no parameter "speed": it has scale,'),
        ("loco", {"regions": []}, 'loco has no parameter "regions"'),
        ("loco", [1], "loco: its parameters are [1]: give names with values."),
        ("a-star", {"scales": "all"}, "choose one of sum, mean, parity"),
        ("radial", {"block": 65}, "choose one of 4, 8, 16, 32, 64, 128"),
        ("vmoba", {"area": "3"}, "give 2 whole numbers from 1 to 4096"),
        ("vmoba", {"area": None}, "give 2 whole numbers"),
        ("prompt-to-prompt", {"reweight": "red"}, "write word=2, other=0.5"),
        ("prompt-to-prompt", {"blend": [1]}, "give words, separated by commas"),
        ("regional-flux", {"background": 3}, "give a text of at most"),
        ("nothing", {}, 'method "nothing" is unknown'),
    ],
)
def test_bad_values_are_refused_with_a_sentence(name: str, given: Any, sentence: str) -> None:
    with pytest.raises(ControlError) as caught:
        parameters(name, given)
    assert sentence in str(caught.value)


def test_a_form_makes_the_control() -> None:
    given = parameters("loco", {"scale": 5, "window_end": 0.5})
    assert make("loco", given, {"regions": REGIONS}, {}) == ac.LoCo(REGIONS, scale=5.0, window=ac.Window(0.0, 0.5))
    assert make("loco", {}, {"regions": REGIONS, "phrases": ["a cat"]}, {}) == ac.LoCo(REGIONS)
    with pytest.raises(ControlError, match="give 0 <= start <= end <= 1"):
        make("loco", {"window_start": 0.9}, {"regions": REGIONS}, {})


def test_only_files_that_the_page_was_given_can_be_named() -> None:
    files = {"plan.json": Path("/plans/plan.json")}
    assert arguments("planned", {"plan": "plan.json"}, {}, files)["plan"] == "/plans/plan.json"
    for name in ("/etc/passwd", "../plan.json", ""):
        with pytest.raises(ControlError, match="planned: there is no file"):
            make("planned", {"plan": name}, {}, files)


def test_a_slider_never_moves_a_default() -> None:
    """0.0625 is not among the places of a slider of hundredths, so such a field is a box for numbers."""
    with gr.Blocks():
        near = component(next(e for e in entries(method("semantic-protection")) if e.name == "near"))
        beta = component(next(e for e in entries(method("loco")) if e.name == "beta"))
    assert isinstance(near, gr.Number)
    assert isinstance(beta, gr.Slider)
    assert Entry("m", "x", "number", 0.0625, "").read("0.0625") == 0.0625
