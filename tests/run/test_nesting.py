"""Blocks inside blocks, several calls in one block, several pipelines on one model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

import attnctrl as ac
from tests import tiny
from tests.probes import REGIONS, Nudge
from tests.spies import Stop, assert_restored, attention_layers, snapshot, stop_at


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


def test_an_idle_block_leaves_the_model_alone() -> None:
    """Nothing to do, nothing to record: no processor of ours, also in the middle of a controlled call."""
    one, control = tiny.sd(), ac.RegionMask(REGIONS)
    two = ac.share(one)
    processors = {name: layer.processor for name, layer in attention_layers(one).items()}
    with ac.control(one):
        stock = tiny.draw(one)
        assert {name: layer.processor for name, layer in attention_layers(one).items()} == processors
    with ac.control(one, control):
        expected = tiny.draw(one)
    between = []

    def callback(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            with ac.control(two, ac.RegionMask(())):
                between.append(tiny.draw(two))
        return given

    with ac.control(one, control):
        assert torch.equal(tiny.draw(one, callback_on_step_end=callback), expected)
    assert torch.equal(between[0], stock)


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
