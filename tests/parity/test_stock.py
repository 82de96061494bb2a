"""A pipeline under controls that ask for nothing gives the stock picture, bit for bit."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor

import attnctrl as ac
from attnctrl.controls import REGISTRY
from tests import tiny
from tests.methods import WEIGHTLESS, idle_forms
from tests.probes import EVERYWHERE, Mask, all_visible
from tests.spies import assert_restored, attention_layers, snapshot

MODELS = {"sd": tiny.sd, "sdxl": tiny.sdxl}
IDLE = idle_forms()


@cache
def stock(model: str, scheduler: str, guidance: float) -> tuple[Any, torch.Tensor]:
    pipe = MODELS[model](scheduler)
    return pipe, tiny.draw(pipe, guidance_scale=guidance)


@pytest.mark.parametrize("guidance", [4.0, 1.0])
@pytest.mark.parametrize("scheduler", tiny.PROMISED)
@pytest.mark.parametrize("model", MODELS)
def test_an_idle_block_changes_no_bit(model: str, scheduler: str, guidance: float) -> None:
    pipe, expected = stock(model, scheduler, guidance)
    before = snapshot(pipe)
    assert torch.equal(tiny.draw(pipe, guidance_scale=guidance), expected)  # the pipeline itself repeats
    with ac.control(pipe):
        assert torch.equal(tiny.draw(pipe, guidance_scale=guidance), expected)
    with ac.control(pipe, record=["cat"]) as run:
        assert torch.equal(tiny.draw(pipe, guidance_scale=guidance), expected)
    assert run.maps["cat"].shape[0] == 3
    with ac.control(pipe, *IDLE.values()):
        assert torch.equal(tiny.draw(pipe, guidance_scale=guidance), expected)
    assert_restored(before, pipe)


@pytest.mark.parametrize("scheduler", ["heun", "pndm"])
def test_schedules_that_repeat_timesteps_are_stock_too(scheduler: str) -> None:
    pipe, expected = stock("sd", scheduler, 4.0)
    with ac.control(pipe, record=["cat"]) as run:
        assert torch.equal(tiny.draw(pipe), expected)
    assert run.sampling is not None
    assert run.sampling.finished
    assert [s.index for s in run.sampling.steps_seen] == list(range(len(pipe.scheduler.timesteps)))


@pytest.mark.parametrize("name", IDLE)
def test_each_idle_form_changes_no_bit(name: str) -> None:
    control = IDLE[name]
    assert control.idle
    pipe, expected = stock("sd", "ddim", 4.0)
    with ac.control(pipe, control) as run:
        assert torch.equal(tiny.draw(pipe), expected)
    assert str(run.report) == "no control acted"
    assert run.losses == []


def test_every_registered_method_has_a_weightless_form() -> None:
    assert WEIGHTLESS.keys() == REGISTRY.keys()


@pytest.mark.parametrize("scheduler", tiny.PROMISED)
@pytest.mark.parametrize("kind", ["img2img", "inpaint9", "inpaint4"])
def test_pipelines_that_start_from_a_picture(kind: str, scheduler: str) -> None:
    pipe = {
        "img2img": lambda: tiny.img2img(scheduler),
        "inpaint9": lambda: tiny.inpaint(scheduler, 9),
        "inpaint4": lambda: tiny.inpaint(scheduler, 4),
    }[kind]()
    for guidance in (4.0, 1.0):
        expected = tiny.redraw(pipe, guidance_scale=guidance)
        with ac.control(pipe):
            assert torch.equal(tiny.redraw(pipe, guidance_scale=guidance), expected)
        with ac.control(pipe, *IDLE.values(), record=["cat"]) as run:
            assert torch.equal(tiny.redraw(pipe, guidance_scale=guidance), expected)
        assert len(run.maps) > 0


STOCK = {
    "sdpa": AttnProcessor2_0,
    "classic": AttnProcessor,
    "sliced": lambda: SlicedAttnProcessor(1),
}


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
@pytest.mark.parametrize("processor", STOCK)
@pytest.mark.parametrize("model", MODELS)
def test_the_controlled_path_computes_what_the_stock_processor_does(model: str, processor: str, scheduler: str) -> None:
    pipe = MODELS[model](scheduler)
    for layer in attention_layers(pipe).values():
        layer.set_processor(STOCK[processor]())
    expected = tiny.draw(pipe)
    control = Mask(make=all_visible, where=EVERYWHERE, branches=("cond", "uncond"))
    with ac.control(pipe, control) as run:
        drawn = tiny.draw(pipe)
    torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=1e-4)
    (row,) = run.report.rows.values()
    assert row.sites == set(attention_layers(pipe))  # every layer did take the controlled path
    assert row.calls == 3 * 2 * len(row.sites)


def test_fused_projections_are_reproduced() -> None:
    pipe = tiny.sd()
    pipe.fuse_qkv_projections(vae=False)
    expected = tiny.draw(pipe)
    with ac.control(pipe):
        assert torch.equal(tiny.draw(pipe), expected)
    with ac.control(pipe, Mask(make=all_visible, where=EVERYWHERE, branches=("cond", "uncond"))):
        torch.testing.assert_close(tiny.draw(pipe), expected, atol=1e-4, rtol=1e-4)
