"""The points of the sampling loop: context, noise, latents and guide."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnctrl as ac
from tests import tiny
from tests.probes import Context, Guide, Latents, Mask, Noise, only_first_key
from tests.spies import COND, UNCOND, spied_steps, watch, watched


@pytest.mark.parametrize("model", [tiny.sd, tiny.sdxl])
def test_context_edits_the_positive_text_alone(model: Any) -> None:
    pipe = model()
    stock, seen = watch(pipe, steps=1), watch(pipe, Context(), steps=1)
    assert torch.equal(seen.texts[0][UNCOND], stock.texts[0][UNCOND])
    assert torch.equal(seen.texts[0][COND], stock.texts[0][COND] + 1)


@pytest.mark.parametrize("scheduler", tiny.PROMISED)
def test_noise_of_unit_variance_under_every_scheduler(scheduler: str) -> None:
    pipe, control = tiny.sd(scheduler), Noise()
    expected = tiny.draw(pipe, steps=2)
    with ac.control(pipe, control):
        assert torch.equal(tiny.draw(pipe, steps=2), expected)  # handed back unchanged
    start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(control.got[0], start)


@pytest.mark.parametrize("scheduler", tiny.PROMISED)
def test_noise_chooses_the_start(scheduler: str) -> None:
    """The picture from noise b, when the control replaces noise a by b, is that of a run that starts with b."""
    pipe = tiny.sd(scheduler)
    other = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(8))
    generator = torch.Generator().manual_seed(7)
    torch.randn(1, 4, 16, 16, generator=generator)  # LCM goes on drawing from where the start left off
    expected = tiny.draw(pipe, latents=other, generator=generator)
    with ac.control(pipe, Noise(edit=lambda noise: other)), watched(pipe) as seen:
        drawn = tiny.draw(pipe)
    assert torch.equal(seen.samples[0][UNCOND], seen.samples[0][COND])
    torch.testing.assert_close(drawn, expected, atol=2e-3, rtol=1e-3)


def test_noise_leaves_the_conditions_of_an_inpainting_model_alone() -> None:
    pipe = tiny.inpaint()
    with ac.control(pipe), watched(pipe) as stock:
        tiny.redraw(pipe, strength=1.0)
    with ac.control(pipe, Noise(edit=torch.zeros_like)), watched(pipe) as seen:
        tiny.redraw(pipe, strength=1.0)
    assert (seen.samples[0][:, :4] == 0).all()
    assert torch.equal(seen.samples[0][:, 4:], stock.samples[0][:, 4:])


def test_latents_sees_what_step_returned_and_the_next_step_gets_its_result() -> None:
    pipe, control = tiny.sd(), Latents()
    with spied_steps(pipe) as steps, ac.control(pipe, control), watched(pipe) as seen:
        drawn = tiny.draw(pipe)
    assert [index for index, _ in control.got] == [0, 1, 2]
    assert all(got is previous for (_, got), (_, _, previous) in zip(control.got, steps, strict=True))
    assert (seen.samples[1] == 0).all()
    assert (seen.samples[2] == 1).all()
    assert (drawn == 2).all()


@pytest.mark.parametrize("guidance", [4.0, 1.0])
@pytest.mark.parametrize("scheduler", tiny.PROMISED)
def test_guide_with_the_pipelines_own_combination(scheduler: str, guidance: float) -> None:
    pipe, control = tiny.sd(scheduler), Guide()
    expected = tiny.draw(pipe, guidance_scale=guidance)
    with ac.control(pipe, control):
        assert torch.equal(tiny.draw(pipe, guidance_scale=guidance), expected)
    prediction = control.got[0]
    assert prediction.cond.shape == (1, 4, 16, 16)
    assert (prediction.uncond is None) == (guidance == 1.0)
    assert prediction.scale == pytest.approx(guidance, rel=1e-5)


@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_guide_decides_what_the_scheduler_gets(guidance: float) -> None:
    pipe = tiny.sd()
    wanted = torch.linspace(-1, 1, 4 * 16 * 16).reshape(1, 4, 16, 16)
    with spied_steps(pipe) as steps, ac.control(pipe, Guide(make=lambda p: wanted)):
        tiny.draw(pipe, guidance_scale=guidance)
    for model_output, _, _ in steps:
        torch.testing.assert_close(model_output, wanted, atol=1e-5, rtol=1e-5)


def test_two_guides_follow_each_other() -> None:
    pipe, second = tiny.sd(), Guide()
    wanted = torch.ones(1, 4, 16, 16)
    with ac.control(pipe, Guide(make=lambda p: wanted), second):
        tiny.draw(pipe, steps=1)
    torch.testing.assert_close(second.got[0].combined, wanted)


def test_guide_may_ask_for_further_predictions() -> None:
    """`again` runs without controls: with the same text it is the stock prediction."""
    pipe = tiny.sd()
    stock = watch(pipe, steps=1).predictions[0]
    answers = []

    def ask(prediction: Any) -> torch.Tensor:
        answers.extend([prediction.cond, prediction.again(None), prediction.again(torch.zeros(1, 24, 16))])
        return prediction.combined

    with ac.control(pipe, Mask(make=only_first_key), Guide(make=ask)):
        tiny.draw(pipe, steps=1)
    cond, again, empty = answers
    torch.testing.assert_close(again, stock[COND], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(cond, again, atol=1e-4)  # the mask acts on the prediction of the step itself
    assert not torch.allclose(empty, again, atol=1e-4)


def test_windows_limit_the_sampling_points() -> None:
    pipe, late = tiny.sd(), ac.Window(0.5, 1.0)
    controls = (Latents(window=late), Guide(window=late))
    with ac.control(pipe, *controls) as run:
        tiny.draw(pipe, steps=4)
    assert {point: row.steps for (_, point), row in run.report.rows.items()} == {"latents": {2, 3}, "guide": {2, 3}}
