"""The control block leaves nothing behind, whatever ends it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

import attnctrl as ac
from attnctrl.processors.unet import UNetFamily
from tests import tiny
from tests.probes import REGIONS, Mask, Nudge, all_visible
from tests.spies import Stop, assert_restored, attention_layers, snapshot, stop_at

BUSY = (ac.RegionMask(REGIONS), ac.LoCo(REGIONS, iterations=1), Nudge())


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


def test_the_stock_processor_runs_where_no_control_acts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside a control's window and sites, the very processor that was there is called."""
    pipe = tiny.sd()
    calls: dict[str, int] = {}

    class Counting(AttnProcessor2_0):
        def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
            calls[attn.label] = calls.get(attn.label, 0) + 1
            return super().__call__(attn, *args, **kwargs)

    # The family knows processors by their exact type; this one is to count as a plain one.
    monkeypatch.setattr(UNetFamily, "plain", (*UNetFamily.plain, Counting))
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
