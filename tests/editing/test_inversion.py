"""Inversions lead back to the picture: exactly, or as far as DDIM run backwards goes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

import attnctrl as ac
from attnctrl import shapes
from attnctrl.controls.editing.null_text import ddim_step
from attnctrl.inversion import Job, ddim_trajectory, inversion
from attnctrl.shapes.render import render
from attnctrl.shapes.world import Scene, Thing
from tests import tiny
from tests.editing.material import EDIT, SOURCE, picture
from tests.joint_models import on_joint_models
from tests.parts import Tiny
from tests.transformers import FAMILIES

EXACT = ("direct", "edit-friendly", "virtual")


def redrawn(pipe: Any, name: str, prompts: list[str], guidance: float, images: int = 1, steps: int = 8) -> Any:
    """The job, and the latents that the run ends with."""
    job = Job(ac.share(pipe), picture(), prompts, images, steps, call={"height": 32, "width": 32})
    start = inversion(name)(job)
    given = {**job.call, **start.call, "num_inference_steps": steps, "guidance_scale": guidance}
    given |= {"num_images_per_prompt": images, "generator": job.generators(), "output_type": "latent"}
    with ac.control(job.pipe, *start.follow, *start.controls, record=False):
        return job, job.pipe(prompt=prompts, latents=start.latents, **given).images


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl])
@pytest.mark.parametrize("name", EXACT)
def test_the_source_comes_back_exactly_under_guidance(name: str, make: Any) -> None:
    job, drawn = redrawn(make(), name, [SOURCE, EDIT], 4.0)
    torch.testing.assert_close(drawn[:1], job.clean(), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(drawn[1], drawn[0], atol=1e-3)


@pytest.mark.parametrize("name", ["edit-friendly", "virtual"])
def test_equal_prompts_come_back(name: str) -> None:
    job, drawn = redrawn(tiny.sd(), name, [SOURCE, SOURCE], 1.0)
    torch.testing.assert_close(drawn, job.clean().expand(2, -1, -1, -1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["ddim", "direct", "negative-prompt"])
def test_ddim_backwards_errs_less_than_the_autoencoder(name: str) -> None:
    """On the trained model; an untrained one has no smooth trajectory to retrace."""
    pipe, prompt = shapes.load("sd"), "a red circle and a blue square on a gray background"
    things = Thing("circle", "red", 0.3, 0.35, 0.17), Thing("square", "blue", 0.7, 0.65, 0.17)
    pixels = render([Scene(things, "gray")])
    job = Job(ac.share(pipe), Image.fromarray(_bytes(pixels[0])), [prompt] * 2, steps=50)
    job.pipe.set_progress_bar_config(disable=True)
    start = inversion(name)(job)
    with ac.control(job.pipe, *start.follow, *start.controls, record=False):
        drawn = job.pipe(job.prompts, num_inference_steps=50, guidance_scale=1.0, latents=start.latents, **start.call)
    with torch.no_grad():
        trip = pipe.vae.decode(job.clean() / pipe.vae.config.scaling_factor).sample
    given = pixels[0] * 2 - 1
    own = (trip[0] - given).square().mean()
    for image in drawn.images:
        redrawn_pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 127.5 - 1
        assert (redrawn_pixels - trip[0].clamp(-1, 1)).square().mean() < own


def _bytes(pixels: torch.Tensor) -> np.ndarray:
    return (pixels.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


def test_the_negative_prompt_undoes_guidance() -> None:
    """At any scale the source's prediction is the one at scale 1."""
    _, plain = redrawn(tiny.sd(), "ddim", [SOURCE, EDIT], 1.0)
    _, guided = redrawn(tiny.sd(), "negative-prompt", [SOURCE, EDIT], 5.0)
    torch.testing.assert_close(guided[0], plain[0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(guided[1], plain[1], atol=1e-3)


def test_a_tuned_empty_prompt_follows_the_trajectory_under_guidance() -> None:
    """On the trained model: nearer to the picture than DDIM alone, for the edit's sake at the same guidance."""
    errors = {}
    for name in ("ddim", "null-text"):
        pipe = shapes.load("sd")
        pipe.set_progress_bar_config(disable=True)
        pixels = render([Scene((Thing("circle", "red", 0.4, 0.45, 0.2),), "gray")])[0]
        prompts = ["a red circle on a gray background", "a blue circle on a gray background"]
        job = Job(pipe, Image.fromarray(_bytes(pixels)), prompts, steps=10)
        start = inversion(name)(job)
        given = {"num_inference_steps": 10, "guidance_scale": 7.5, "output_type": "latent", **start.call}
        controls = [replace(one, rate=0.03) for one in start.controls]
        with ac.control(job.pipe, *controls, record=False):
            drawn = job.pipe(prompts, latents=start.latents, **given).images
        errors[name] = float((drawn[0] - job.clean()[0]).square().mean())
    assert errors["null-text"] < 0.3 * errors["ddim"]


def test_one_step_of_ddim_is_the_schedulers() -> None:
    scheduler = DDIMScheduler(**tiny.BETAS, clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(10)
    sample, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    kept, after = (float(scheduler.alphas_cumprod[t]) for t in scheduler.timesteps[3:5])
    expected = scheduler.step(noise, scheduler.timesteps[3], sample).prev_sample
    torch.testing.assert_close(ddim_step(sample, noise, kept, after), expected)


@pytest.mark.parametrize("name", EXACT)
def test_several_pictures_differ_in_their_edits_only(name: str) -> None:
    job, drawn = redrawn(tiny.sd(), name, [SOURCE, EDIT], 4.0, images=2)
    torch.testing.assert_close(drawn[:2], job.clean().expand(2, -1, -1, -1), atol=1e-4, rtol=1e-4)
    assert torch.allclose(drawn[2], drawn[3], atol=1e-4) == (name == "direct")  # DDIM has one trajectory


def test_the_trajectory_runs_from_noise_to_picture_and_leaves_the_scheduler() -> None:
    pipe = tiny.sd()
    job, before = Job(pipe, picture(), [SOURCE, EDIT], steps=5, call={"height": 32, "width": 32}), pipe.scheduler
    path = ddim_trajectory(job)
    assert path.shape == (6, 1, 4, 16, 16)
    assert torch.equal(path[-1], job.clean())
    assert pipe.scheduler is before


@on_joint_models
def test_rf_inversion_runs_the_flow_backwards(family: Tiny) -> None:
    pipe = family.make()
    size = {"height": 32, "width": 32, **family.more}
    job = Job(ac.share(pipe), picture(), [SOURCE, EDIT], steps=6, call=size)
    before = job.pipe.scheduler
    start = inversion("rf")(job)
    assert job.pipe.scheduler is before
    assert start.latents is not None
    assert len(start.latents) == 2
    assert torch.equal(start.latents[0], start.latents[1])
    with pytest.raises(ac.ControlError, match='use "direct" or "virtual"'):
        inversion("rf")(Job(tiny.sd(), picture(), [SOURCE, EDIT]))


def test_flows_cannot_take_ddim() -> None:
    job = Job(FAMILIES["flux"].make(), picture(), [SOURCE, EDIT])
    assert inversion("virtual")(job).controls
    with pytest.raises(ac.ControlError, match='draws by rectified flow: use "virtual"'):
        inversion("direct")(job)
    with pytest.raises(ac.ControlError, match="choose one of ddim, direct"):
        inversion("magic")
