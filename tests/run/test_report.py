"""What a run reports, and the error of a control that acted nowhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

import attnctrl as ac
from tests import tiny
from tests.probes import EVERYWHERE, REGIONS, Mask, Token
from tests.spies import Stop, assert_restored, attention_layers, snapshot, stop_at


def test_the_report_says_what_acted_where() -> None:
    pipe = tiny.sd()
    with ac.control(pipe, ac.RegionMask(REGIONS, window=ac.Window(0.0, 0.5)), ac.LoCo(REGIONS, iterations=2)) as run:
        assert str(run.report) == "no control acted"
        tiny.draw(pipe, steps=4)
    rows = run.report.rows
    assert set(rows) == {(0, "mask"), (1, "loss")}
    mask, loss = rows[0, "mask"], rows[1, "loss"]
    assert (mask.control, mask.point) == ("RegionMask", "mask")
    assert mask.steps == {0, 1}
    assert mask.sites == set(attention_layers(pipe, "cross"))
    assert mask.seconds > 0
    assert loss.steps == {0, 1}
    assert loss.calls == 4
    assert loss.sites == set()
    text = str(run.report)
    assert len(text.splitlines()) == 3
    assert "RegionMask" in text
    assert "0-1" in text


def test_the_losses_of_a_run() -> None:
    pipe = tiny.sd()
    with ac.control(pipe, Token(iterations=2)) as run:
        tiny.draw(pipe, ["a cat", "a dog"], steps=2)
    assert [(v.control, v.step, v.iteration) for v in run.losses] == [
        ("Token", step, i) for step in (0, 1) for i in (0, 1)
    ]
    assert all(len(v.values) == 2 for v in run.losses)  # one value per picture


def test_properties_before_any_call() -> None:
    with ac.control(tiny.sd(), ac.RegionMask(REGIONS)) as run:
        assert run.sampling is None
        assert run.losses == []
        assert len(run.maps) == 0
    with pytest.raises(KeyError, match="no maps"):
        run.maps["cat"]


def test_a_window_outside_of_an_image_to_image_run_is_an_error() -> None:
    pipe = tiny.img2img()
    expected, before = tiny.redraw(pipe, strength=0.5), snapshot(pipe)
    with (
        pytest.raises(ac.ControlError, match=r"RegionMask acted nowhere: its window is 0 to 0\.2 .* 0\.50 to 0\.75"),
        ac.control(pipe, ac.RegionMask(REGIONS, window=ac.Window(0.0, 0.2))),
    ):
        tiny.redraw(pipe, strength=0.5)
    assert_restored(before, pipe)
    assert torch.equal(tiny.redraw(pipe, strength=0.5), expected)


PLACED = ac.Subject("cat", Image.new("RGB", (32, 32)), region=(0, 0, 1, 1))
NOWHERE: dict[str, tuple[ac.Control, str]] = {
    "no such block": (Mask(where=ac.Where(blocks=("side",))), r"Where\(.*side.*\) selects none of the 14"),
    "too fine": (Mask(where=ac.Where(max_tokens=3)), r"selects none of the 14 attention sites"),
    "too late": (ac.MaskedReference([PLACED], from_layer=0.99), "leave none of the 14 attention sites"),
    "no such branch": (Mask(branches=("middle",)), r"no guidance branch .*middle"),
    "no steps": (Token(iterations=0), r"asked for nothing"),
}


@pytest.mark.parametrize("case", NOWHERE)
def test_a_control_that_acts_nowhere_says_why(case: str) -> None:
    control, sentence = NOWHERE[case]
    pipe = tiny.sd()
    before = snapshot(pipe)
    with (
        pytest.raises(ac.ControlError, match=rf"{control.name} acted nowhere: .*{sentence}"),
        ac.control(pipe, control),
    ):
        tiny.draw(pipe, ["a cat and a dog", "cat"], steps=2)
    assert_restored(before, pipe)


def test_a_control_that_acted_in_one_of_two_calls_is_fine() -> None:
    pipe = tiny.img2img()
    with ac.control(pipe, ac.RegionMask(REGIONS, window=ac.Window(0.0, 0.3))) as run:
        tiny.redraw(pipe, strength=1.0)
        tiny.redraw(pipe, strength=0.25)
    assert run.samplings[0].report.acted(0)
    assert not run.samplings[1].report.acted(0)


def test_the_sentence_does_not_hide_the_users_own_exception() -> None:
    pipe = tiny.sd()
    with pytest.raises(Stop), ac.control(pipe, Mask(where=ac.Where(blocks=("side",)))):
        tiny.draw(pipe, steps=2, callback_on_step_end=stop_at(1))


def test_both_branches_can_be_chosen() -> None:
    pipe = tiny.sd()
    seen = []

    def record(call: Any) -> None:
        seen.append((call.branch, call.query.shape[0]))

    with ac.control(pipe, Mask(make=record, where=EVERYWHERE, branches=("uncond",))):
        tiny.draw(pipe, steps=1, num_images_per_prompt=2)
    assert set(seen) == {("uncond", 2)}
    assert len(seen) == len(attention_layers(pipe))
