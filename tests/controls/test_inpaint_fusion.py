"""Inpainting fusion against its card."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

import attnctrl as ac
from attnctrl.controls.editing.inpaint_fusion import fused
from tests import tiny
from tests.hosts.test_batches import PER_PROMPT, PROMPTS, seeds
from tests.joint_models import on_joint_models
from tests.parts import Tiny
from tests.probes import REGIONS, Guide, Latents
from tests.transformers import FAMILIES, draw

LEFT = (ac.Region("cat", box=(0.0, 0.0, 0.5, 1.0)),)


def pictures(drawn: torch.Tensor, family: Tiny) -> torch.Tensor:
    """The pipeline's latents as (batch, latent tokens, rest), left columns first."""
    _, height, width = family.grid
    if drawn.ndim == 3:
        return drawn.unflatten(1, (height, width)).transpose(1, 2)
    return drawn.unflatten(3, (width, -1)).permute(0, 3, 2, 1, 4)


def test_fusion_by_hand() -> None:
    model, source = torch.full((1, 1, 1, 2), 4.0), torch.full((1, 1, 1, 2), 1.0)
    inside = torch.tensor([[[[True, False]]]])
    assert fused(model, source, inside, 0.0).flatten().tolist() == [4.0, 1.0]
    assert fused(model, source, inside, 0.5).flatten().tolist() == [4.0, 2.0]


@on_joint_models
def test_outside_the_end_is_the_earlier_picture_bit_for_bit(family: Tiny) -> None:
    """With guidance, beside EliGen: only the regions are drawn anew."""
    pipe = family.make()
    source = draw(pipe, family)
    anew = {"generator": torch.Generator().manual_seed(8)}
    controls = ac.EliGen(LEFT, entity_tokens=4), ac.InpaintFusion(LEFT, source=source)
    with ac.control(pipe, *controls) as run:
        drawn = draw(pipe, family, "a dog and a cat", **anew)
    half = family.grid[2] // 2
    before, after = pictures(source, family), pictures(drawn, family)
    assert torch.equal(after[:, half:], before[:, half:])
    assert not torch.isclose(after[:, :half], before[:, :half], atol=1e-3).all(dim=-1).any()
    assert {row.point for row in run.report.rows.values() if row.control == "InpaintFusion"} == {"guide", "latents"}


@on_joint_models
def test_rag_repaints(family: Tiny) -> None:
    pipe = family.make()
    source = draw(pipe, family)
    about = ac.RAG(LEFT, hard_binding=0.5, soft_refinement=0.0)
    with ac.control(pipe, about, ac.InpaintFusion(LEFT, source=source)):
        drawn = draw(pipe, family)
    half = family.grid[2] // 2
    assert torch.equal(pictures(drawn, family)[:, half:], pictures(source, family)[:, half:])
    assert not torch.allclose(drawn, source, atol=1e-3)


@on_joint_models
def test_outside_the_way_there_is_the_source_with_the_noise_of_the_moment(family: Tiny) -> None:
    """After each step of a rectified flow: (1 - sigma) source + sigma noise."""
    pipe, seen, noise = family.make(), [], []

    class Keep(ac.Control):
        def noise(self, start: torch.Tensor, sampling: Any, state: Any) -> torch.Tensor:
            noise.append(start)
            return start

        def latents(self, latents: torch.Tensor, step: Any, state: Any) -> torch.Tensor:
            seen.append(latents)
            return latents

    source = draw(pipe, family, steps=1)
    with ac.control(pipe, Keep(), ac.InpaintFusion(LEFT, source=source)) as run:
        draw(pipe, family, steps=4)
    assert run.sampling is not None
    clean = run.sampling.clean(source, seen[0])  # type: ignore[misc]
    half = clean.shape[-1] // 2
    for sigma, latents in zip(pipe.scheduler.sigmas[1:], seen, strict=True):
        expected = (1 - sigma) * clean + sigma * noise[0]
        torch.testing.assert_close(latents[..., half:], expected[..., half:], atol=1e-4, rtol=1e-4)


@on_joint_models
def test_without_regions_or_with_one_of_everything_it_is_the_stock_picture(family: Tiny) -> None:
    pipe = family.make()
    expected = draw(pipe, family)
    with ac.control(pipe, ac.InpaintFusion((), source=expected)):
        assert torch.equal(draw(pipe, family), expected)
    everything = (ac.Region("cat", box=(0.0, 0.0, 1.0, 1.0)),)
    with ac.control(pipe, ac.InpaintFusion(everything, source=torch.zeros_like(expected))):
        torch.testing.assert_close(draw(pipe, family), expected, atol=1e-5, rtol=1e-5)


def test_before_guidance_the_background_drifts_as_in_the_official_code() -> None:
    """v = s * v_in - (s - 1) * v_uncond outside, against v_in after guidance; the two agree without guidance."""
    family = FAMILIES["sd3"]
    pipe = family.make()
    source = draw(pipe, family)
    after, first = Guide(), Guide()
    with ac.control(pipe, first, ac.InpaintFusion(LEFT, source=source, fuse="before"), after):
        draw(pipe, family, steps=1)
    plain, scale = first.got[0], first.got[0].scale
    expected = plain.uncond + scale * (plain.toward(source) - plain.uncond)
    half = source.shape[-1] // 2
    torch.testing.assert_close(after.got[0].combined[..., half:], expected[..., half:], atol=1e-4, rtol=1e-4)
    runs = []
    for fuse in ("before", "after"):
        with ac.control(pipe, ac.InpaintFusion(LEFT, source=source, fuse=fuse)):
            runs.append(draw(pipe, family, free=True))
    torch.testing.assert_close(runs[0], runs[1], atol=1e-4, rtol=1e-4)


@on_joint_models
def test_the_source_may_be_a_picture(family: Tiny) -> None:
    """One for all, of any size; its colour is what the pipeline's autoencoder makes of it."""
    pipe = family.make()
    height, width = family.size
    picture = Image.new("RGB", (2 * width, 2 * height), (200, 30, 60))
    with ac.control(pipe, ac.InpaintFusion(LEFT, source=picture), kept := Latents()) as run:
        draw(pipe, family, num_images_per_prompt=2, generator=seeds(1, 2))
    assert run.sampling is not None
    clean = run.sampling.clean(picture, kept.got[0][1])  # type: ignore[misc]
    pixels = pipe.image_processor.preprocess(picture, height=height, width=width)
    if family is FAMILIES["qwen"]:
        expected = pipe.vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]
    else:
        expected = pipe.vae.encode(pixels).latent_dist.mode()
    torch.testing.assert_close(clean, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scheduler", tiny.PROMISED)
def test_on_unets_of_any_shape(scheduler: str) -> None:
    """Two prompts with regions of their own, latents that are not square, the noise added by steps or not."""
    pipe = tiny.sd(scheduler)
    source = tiny.draw(pipe, steps=2, size=(16, 32))
    controls = ac.RegionMask(PER_PROMPT), ac.InpaintFusion(PER_PROMPT, source=source)
    with ac.control(pipe, *controls):
        drawn = tiny.draw(pipe, PROMPTS, 2, size=(16, 32), num_images_per_prompt=2, generator=seeds(1, 2, 3, 4))
    for p, regions in enumerate(PER_PROMPT):
        inside = torch.stack([r.raster(8, 16, "any") for r in regions]).amax(dim=0) > 0
        for one in drawn[2 * p : 2 * p + 2]:
            assert torch.equal(one[:, ~inside], source[0][:, ~inside])
            assert not torch.isclose(one, source[0], atol=1e-4)[:, inside].all()


def test_a_prompt_without_regions_is_left_to_the_model() -> None:
    pipe = tiny.sd()
    alone = tiny.draw(pipe, PROMPTS, 2, generator=seeds(1, 2))
    about = ac.InpaintFusion((REGIONS[:1], ()), source=torch.zeros(1, 4, 16, 16))
    with ac.control(pipe, about):
        drawn = tiny.draw(pipe, PROMPTS, 2, generator=seeds(1, 2))
    torch.testing.assert_close(drawn[1], alone[1], atol=1e-4, rtol=1e-4)
    assert not drawn[0, ..., 8:].any()
    assert drawn[0, ..., :8].any()


def test_sources_that_do_not_fit_are_refused() -> None:
    pipe = tiny.sd()
    for source, sentence in (
        (None, r"InpaintFusion needs the picture that is kept outside the regions: give source="),
        (torch.zeros(1, 4, 8, 8), r"latents of shape \(1, 4, 8, 8\), this run has \(1, 4, 16, 16\)"),
        (torch.zeros(3, 4, 16, 16), r"give one for all pictures or one for each"),
    ):
        with pytest.raises(ac.ControlError, match=sentence), ac.control(pipe, ac.InpaintFusion(LEFT, source=source)):
            tiny.draw(pipe, steps=1)
