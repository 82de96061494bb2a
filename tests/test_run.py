"""The control block: what it puts in place, what it reports, what it refuses, and that it leaves nothing behind."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor2_0

import attnctrl as ac
from attnctrl.processors import unet
from tests import tiny
from tests.probes import (
    EVERYWHERE,
    REGIONS,
    Attend,
    Foreign,
    Mask,
    Nudge,
    Token,
    all_visible,
    assert_restored,
    attention_layers,
    only_first_key,
    snapshot,
)

BUSY = (ac.RegionMask(REGIONS), ac.LoCo(REGIONS, iterations=1), Nudge())


class Stop(Exception):
    """Raised by a callback in the middle of the loop."""


def stop_at(step: int) -> Any:
    def callback(pipe: Any, index: int, timestep: Any, values: dict) -> dict:
        if index == step:
            raise Stop
        return values

    return callback


@pytest.mark.parametrize("model", [tiny.sd, tiny.sdxl])
def test_the_pipeline_is_restored_after_a_run(model: Any) -> None:
    pipe = model()
    expected, before = tiny.draw(pipe), snapshot(pipe)
    with ac.control(pipe, *BUSY):
        inside = snapshot(pipe)
        changed = tiny.draw(pipe)
    assert inside.keys() != before.keys()  # the snapshot does see what a block puts in place
    assert not torch.equal(changed, expected)
    assert_restored(before, pipe)
    assert torch.equal(tiny.draw(pipe), expected)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_the_pipeline_is_restored_after_an_exception_in_the_loop(step: int) -> None:
    pipe = tiny.sd()
    expected, before = tiny.draw(pipe), snapshot(pipe)
    with pytest.raises(Stop), ac.control(pipe, *BUSY):
        tiny.draw(pipe, callback_on_step_end=stop_at(step))
    assert_restored(before, pipe)
    assert torch.equal(tiny.draw(pipe), expected)


def test_a_block_goes_on_after_an_exception_inside_it() -> None:
    pipe = tiny.sd()
    with ac.control(pipe, *BUSY):
        expected = tiny.draw(pipe)
    with ac.control(pipe, *BUSY) as run:
        with pytest.raises(Stop):
            tiny.draw(pipe, callback_on_step_end=stop_at(1))
        assert torch.equal(tiny.draw(pipe), expected)
    assert len(run.samplings) == 2


def test_what_was_there_before_comes_back() -> None:
    """Methods that someone else put on the instances are kept, and so are hooks."""
    pipe = tiny.sd()
    calls = []

    def step(*args: Any, **kwargs: Any) -> Any:
        calls.append("step")
        return type(pipe.scheduler).step(pipe.scheduler, *args, **kwargs)

    pipe.scheduler.step = step
    handle = pipe.unet.register_forward_hook(lambda *args: calls.append("hook"))
    before = snapshot(pipe)
    with ac.control(pipe, ac.RegionMask(REGIONS)):
        tiny.draw(pipe, steps=2)
    assert_restored(before, pipe)
    assert pipe.scheduler.step is step
    assert calls == ["hook", "step"] * 2
    handle.remove()


def test_a_processor_exchanged_inside_the_block_stays() -> None:
    pipe, mine = tiny.sd(), AttnProcessor2_0()
    layer = attention_layers(pipe)["mid_block.attentions.0.transformer_blocks.0.attn2"]
    with ac.control(pipe):
        layer.set_processor(mine)
    assert layer.processor is mine


def test_nested_blocks_both_act() -> None:
    pipe = tiny.sd()
    first, second = ac.RegionMask(REGIONS), Nudge()
    before = snapshot(pipe)
    with ac.control(pipe, first, second):
        together = tiny.draw(pipe)
    with ac.control(pipe, first) as outer:
        outside = snapshot(pipe)
        with ac.control(pipe, second) as inner:
            nested = tiny.draw(pipe)
        assert_restored(outside, pipe)
        alone = tiny.draw(pipe)
    assert_restored(before, pipe)
    assert torch.equal(nested, together)
    assert {row.control for row in inner.report.rows.values()} == {"RegionMask", "Nudge"}
    assert {row.control for row in outer.report.rows.values()} == {"RegionMask"}
    assert not torch.equal(alone, together)


def test_nested_blocks_are_restored_after_an_exception() -> None:
    pipe = tiny.sd()
    before = snapshot(pipe)
    with pytest.raises(Stop), ac.control(pipe, ac.RegionMask(REGIONS)), ac.control(pipe, Nudge()):
        tiny.draw(pipe, callback_on_step_end=stop_at(1))
    assert_restored(before, pipe)


@pytest.mark.parametrize("own_scheduler", [True, False])
def test_two_pipelines_on_one_unet(own_scheduler: bool) -> None:
    """Each call runs under the controls of its own pipeline, whichever block is the inner one."""
    one = tiny.sd()
    parts = dict(one.components)
    if own_scheduler:
        parts["scheduler"] = tiny.SCHEDULERS["ddim"]()
    two = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    two.set_progress_bar_config(disable=True)
    control_one, control_two = ac.LoCo(REGIONS, iterations=1), ac.RegionMask(REGIONS)
    stock, before, before_two = tiny.draw(one), snapshot(one), snapshot(two)
    with ac.control(one, control_one):
        alone_one = tiny.draw(one)
    with ac.control(two, control_two):
        alone_two = tiny.draw(two)
        assert torch.equal(tiny.draw(one), stock)  # same weights, not under control
    with ac.control(one, control_one) as outer, ac.control(two, control_two) as inner:
        assert torch.equal(tiny.draw(one), alone_one)
        assert torch.equal(tiny.draw(two), alone_two)
        with pytest.raises(Stop):
            tiny.draw(two, callback_on_step_end=stop_at(1))
        assert torch.equal(tiny.draw(one), alone_one)  # a broken-off call of the inner pipeline leaves no trace
    assert_restored(before, one)
    assert_restored(before_two, two)
    assert {row.control for row in outer.report.rows.values()} == {"LoCo"}
    assert {row.control for row in inner.samplings[0].report.rows.values()} == {"RegionMask"}


def test_control_objects_are_reusable() -> None:
    pipe, controls = tiny.sd(), (ac.AStar(("cat", "dog")), ac.DenseDiffusion(REGIONS))
    with ac.control(pipe, *controls):
        first = tiny.draw(pipe)
    with ac.control(pipe, *controls):
        second = tiny.draw(pipe)
    with ac.control(tiny.sd(), *controls) as run:
        third = tiny.draw(run.pipe)
    assert torch.equal(first, second)
    assert torch.equal(first, third)


def test_two_calls_inside_one_block() -> None:
    pipe = tiny.sd()
    controls = (ac.AStar(("cat", "dog")),)
    with ac.control(pipe, *controls):
        expected = tiny.draw(pipe)
    with ac.control(pipe, *controls) as run:
        tiny.draw(pipe, "a dog and a cat", steps=2)
        first = run.sampling
        second_picture = tiny.draw(pipe)  # A-STAR's memory starts anew
    assert torch.equal(second_picture, expected)
    assert len(run.samplings) == 2
    assert run.sampling is run.samplings[1] is not first
    assert run.losses is run.samplings[1].losses
    assert {value.step for value in run.losses} == {0, 1}  # progress 0 and 1/3 lie in the window's first half
    assert {value.step for value in run.samplings[0].losses} == {0}


def test_a_scheduler_exchanged_inside_the_block_is_controlled() -> None:
    pipe, control = tiny.sd(), ac.LoCo(REGIONS, iterations=1)
    pipe.scheduler = tiny.SCHEDULERS["euler"]()
    with ac.control(pipe, control):
        expected = tiny.draw(pipe)
    pipe.scheduler = tiny.SCHEDULERS["ddim"]()
    with ac.control(pipe, control) as run:
        pipe.scheduler = tiny.SCHEDULERS["euler"]()
        assert torch.equal(tiny.draw(pipe), expected)
    assert len(run.losses) == 2
    assert "step" not in pipe.scheduler.__dict__


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


NOWHERE: dict[str, tuple[ac.Control, str]] = {
    "no such block": (Mask(where=ac.Where(blocks=("side",))), r"Where\(.*side.*\) selects none of the 14"),
    "too fine": (Mask(where=ac.Where(max_tokens=3)), r"selects none of the 14 attention sites"),
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
        tiny.draw(pipe, steps=2)
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


def test_foreign_processors_are_left_working() -> None:
    pipe = tiny.sd()
    for layer in attention_layers(pipe, "cross").values():
        layer.set_processor(Foreign())
    expected, before = tiny.draw(pipe), snapshot(pipe)
    with ac.control(pipe):
        assert torch.equal(tiny.draw(pipe), expected)
    with ac.control(pipe, Mask(make=all_visible, where=ac.Where(kinds=("self",)))):
        torch.testing.assert_close(tiny.draw(pipe), expected, atol=1e-4, rtol=1e-4)
    with ac.control(pipe, Mask(make=only_first_key, where=ac.Where(kinds=("self",)))):
        assert not torch.allclose(tiny.draw(pipe), expected, atol=1e-4)
    with ac.control(pipe, Nudge(by=0.5)):
        assert not torch.allclose(tiny.draw(pipe), expected, atol=1e-2)
    assert_restored(before, pipe)


@pytest.mark.parametrize("control", [ac.RegionMask(REGIONS), ac.LoCo(REGIONS), ac.DenseDiffusion(REGIONS)])
def test_a_control_that_needs_a_foreign_layer_is_refused(control: ac.Control) -> None:
    pipe = tiny.sd()
    for layer in attention_layers(pipe, "cross").values():
        layer.set_processor(Foreign())
    before = snapshot(pipe)
    with (
        pytest.raises(ac.ControlError, match=rf"{control.name} needs cross-attention, which Foreign has .*attn2"),
        ac.control(pipe, control),
    ):
        pytest.fail("the block was entered")
    assert_restored(before, pipe)


def test_maps_of_layers_that_somebody_else_has_taken_over() -> None:
    pipe = tiny.sd()
    for layer in attention_layers(pipe, "cross").values():
        layer.set_processor(Foreign())
    with pytest.raises(ac.ControlError, match=r'"cat" cannot be recorded.*Foreign'), ac.control(pipe, record=["cat"]):
        tiny.draw(pipe)


def test_two_replacing_controls_refuse_each_other() -> None:
    pipe = tiny.sd()
    before = snapshot(pipe)
    with (
        pytest.raises(ac.ControlError, match=r"Attend and Attend cannot work together: both replace the attention"),
        ac.control(pipe, Attend(), Attend()),
    ):
        pytest.fail("the block was entered")
    with ac.control(pipe, Attend(window=ac.Window(0.2, 0.2)), Attend()):  # an idle one is no rival
        tiny.draw(pipe, steps=2)
    with (
        ac.control(pipe, Attend()),
        pytest.raises(ac.ControlError, match="cannot work together"),
        ac.control(pipe, Attend()),
    ):
        pytest.fail("the inner block was entered")
    assert_restored(before, pipe)


def test_controls_may_refuse_each_other_with_their_own_sentence() -> None:
    class Shy(Nudge):
        def conflict(self, other: ac.Control) -> str | None:
            return "it wants to be alone." if isinstance(other, Mask) else None

    for pair in ((Shy(), Mask()), (Mask(), Shy())):
        with (
            pytest.raises(ac.ControlError, match=r"(Shy and Mask|Mask and Shy) cannot work together: it wants to be"),
            ac.control(tiny.sd(), *pair),
        ):
            pytest.fail("the block was entered")


def test_share_inside_a_block_is_refused() -> None:
    pipe = tiny.sd()
    with ac.control(pipe):
        with pytest.raises(ac.ControlError, match=r"share\(pipe\) was called inside a control block"):
            ac.share(pipe)
        refused: list[BaseException] = []
        thread = threading.Thread(target=lambda: refused.append(_raised(lambda: ac.share(pipe))))
        thread.start()
        thread.join()
    assert isinstance(refused[0], ac.ControlError)
    ac.share(pipe)


def _raised(function: Any) -> BaseException:
    try:
        function()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def test_share_makes_an_independent_light_copy() -> None:
    pipe = tiny.sdxl()
    light = ac.share(pipe)
    assert light.unet is pipe.unet
    assert light.vae is pipe.vae
    assert light.text_encoder_2 is pipe.text_encoder_2
    assert light.scheduler is not pipe.scheduler
    assert light.tokenizer is not pipe.tokenizer
    assert light.tokenizer_2 is not pipe.tokenizer_2
    expected = tiny.draw(pipe)
    assert torch.equal(tiny.draw(light), expected)
    with ac.control(light, ac.RegionMask(REGIONS)):
        assert torch.equal(tiny.draw(pipe), expected)
        assert not torch.equal(tiny.draw(light), expected)


@pytest.mark.parametrize("what", ["enter", "call"])
def test_one_pipeline_object_in_two_threads_is_refused(what: str) -> None:
    """The other thread gets the sentence; the block goes on unharmed."""
    pipe, control = tiny.sd(), ac.RegionMask(REGIONS)
    errors: list[BaseException] = []

    def other() -> None:
        def use() -> None:
            if what == "call":
                tiny.draw(pipe, steps=2)
            else:
                with ac.control(pipe, Nudge()):
                    tiny.draw(pipe, steps=2)

        errors.append(_raised(use))

    before = snapshot(pipe)
    with ac.control(pipe, control):
        expected = tiny.draw(pipe)
        inside = snapshot(pipe)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(timeout=60)
        assert_restored(inside, pipe)
        assert torch.equal(tiny.draw(pipe), expected)
    assert_restored(before, pipe)
    assert isinstance(errors[0], ac.ControlError), errors
    assert "another thread" in str(errors[0])
    assert "share(pipe)" in str(errors[0])


def test_things_that_are_not_controls() -> None:
    with pytest.raises(ac.ControlError, match="is not a control: pass instances"), ac.control(tiny.sd(), ac.RegionMask):
        pytest.fail("the block was entered")


def test_the_stock_processor_runs_where_no_control_acts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside a control's window and sites, the very processor that was there is called."""
    pipe = tiny.sd()
    calls: dict[str, int] = {}

    class Counting(AttnProcessor2_0):
        def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
            calls[attn.label] = calls.get(attn.label, 0) + 1
            return super().__call__(attn, *args, **kwargs)

    # The family knows processors by their exact type; this one is to count as a plain one.
    monkeypatch.setattr(unet, "PLAIN", (*unet.PLAIN, Counting))
    for name, layer in attention_layers(pipe).items():
        layer.label = name
        layer.set_processor(Counting())
    where = ac.Where(kinds=("self",), blocks=("mid",))
    with ac.control(pipe, Mask(make=all_visible, where=where, window=ac.Window(0.0, 0.5))):
        tiny.draw(pipe, steps=4)
    mid = "mid_block.attentions.0.transformer_blocks.0.attn1"
    assert calls.pop(mid) == 2  # steps 2 and 3; in 0 and 1 the mask ruled
    assert set(calls.values()) == {4}
    assert len(calls) == len(attention_layers(pipe)) - 1


def test_both_branches_can_be_chosen() -> None:
    pipe = tiny.sd()
    seen = []

    def record(call: Any) -> None:
        seen.append((call.branch, call.query.shape[0]))

    with ac.control(pipe, Mask(make=record, where=EVERYWHERE, branches=("uncond",))):
        tiny.draw(pipe, steps=1, num_images_per_prompt=2)
    assert set(seen) == {("uncond", 2)}
    assert len(seen) == len(attention_layers(pipe))
