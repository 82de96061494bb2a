"""Further predictions that a guide control may ask for: other text, parts of the picture, ways to a given one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

import attnctrl as ac
from attnctrl.guidance import Crop, Prediction
from tests import tiny
from tests.probes import REGIONS, Guide
from tests.spies import spied_steps
from tests.transformers import FAMILIES, draw

UNETS: dict[str, Callable[[], Any]] = {"sd": tiny.sd, "sdxl": tiny.sdxl}
CROPPED = ("flux", "sd3", "qwen", "pixart", "sana")


def answers(name: str, ask: Callable[[Prediction], Any], *controls: ac.Control, **kwargs: Any) -> tuple[Any, Any]:
    """What the first step's guide point is told by `ask`, and the run."""
    got: list[Any] = []
    guide = Guide(make=lambda prediction: (got.append(ask(prediction)), prediction.combined)[1])
    pipe = UNETS[name]() if name in UNETS else FAMILIES[name].make()
    with ac.control(pipe, *controls, guide) as run:
        if name in UNETS:
            tiny.draw(pipe, steps=1, **kwargs)
        else:
            draw(pipe, FAMILIES[name], steps=1, **kwargs)
    return got[0], run


@pytest.mark.parametrize("name", [*UNETS, *CROPPED])
def test_a_crop_of_everything_is_the_whole_picture(name: str) -> None:
    def ask(prediction: Prediction) -> Any:
        _, height, width = (1, 16, 16) if name in UNETS else FAMILIES[name].grid
        crop = Crop(slice(0, 1), slice(0, height), slice(0, width))
        return [(prediction.again(crop=crop, branch=b), getattr(prediction, b)) for b in ("cond", "uncond")]

    for part, whole in answers(name, ask)[0]:
        torch.testing.assert_close(part, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [*UNETS, *CROPPED])
def test_a_crop_is_what_its_pixels_alone_give(name: str) -> None:
    """The upper right part of the second picture: the same whatever lies outside of it, and sensitive to the inside."""
    height, width = (16, 16) if name in UNETS else FAMILIES[name].grid[1:]
    crop = Crop(slice(1, 2), slice(0, height // 2), slice(width // 2, width))
    parts = []
    for outside, inside in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)):

        def edit(noise: torch.Tensor, outside: float = outside, inside: float = inside) -> torch.Tensor:
            moved = noise + outside
            side = noise.shape[-1] // 2
            moved[1, ..., : noise.shape[-2] // 2, side:] = noise[1, ..., : noise.shape[-2] // 2, side:] + inside
            return moved

        part, _ = answers(name, lambda p: p.again(crop=crop), _Start(edit=edit), num_images_per_prompt=2)
        parts.append(part)
    one, other, moved = parts
    assert one.shape[0] == 1
    assert one.shape[-1] / one.shape[-2] == crop_ratio(crop)
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(one, moved, atol=1e-3)


def crop_ratio(crop: Crop) -> float:
    return (crop.columns.stop - crop.columns.start) / (crop.rows.stop - crop.rows.start)


class _Start(ac.Control):
    """Noise chosen by `edit`."""

    def __init__(self, edit: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        object.__setattr__(self, "edit", edit)

    def noise(self, noise: torch.Tensor, sampling: Any, state: Any) -> torch.Tensor:
        return self.edit(noise)


def test_a_crop_of_flux_is_a_smaller_picture_of_it() -> None:
    """Its tokens and positions are those that the pipeline would make for a picture of that size."""
    pipe, family = FAMILIES["flux"].make(), FAMILIES["flux"]
    crop = Crop(slice(0, 1), slice(1, 3), slice(2, 6))
    inputs: list[dict[str, Any]] = []
    pipe.transformer.register_forward_pre_hook(lambda m, a, k: inputs.append(k), with_kwargs=True)
    guide = Guide(make=lambda p: (p.again(crop=crop), p.combined)[1])
    with ac.control(pipe, guide):
        draw(pipe, family, steps=1, free=True)
    whole, part = inputs
    ids = pipe._prepare_latent_image_ids(1, 2, 4, "cpu", torch.float32)
    assert torch.equal(part["img_ids"], ids)
    tokens = whole["hidden_states"].unflatten(1, family.grid[1:])[:, 1:3, 2:6].flatten(1, 2)
    assert torch.equal(part["hidden_states"], tokens)


@pytest.mark.parametrize("name", ["flux2", "zimage"])
def test_models_that_cannot_draw_a_part_say_so(name: str) -> None:
    crop = Crop(slice(0, 1), slice(0, 2), slice(0, 2))
    with pytest.raises(ac.ControlError, match=r"a part of the picture cannot be drawn on its own by \w+: that works"):
        answers(name, lambda p: p.again(crop=crop))


@pytest.mark.parametrize("name", ["sd", "sdxl", *CROPPED])
def test_other_text_is_read_as_it_is_encoded(name: str) -> None:
    """Further predictions with another prompt's text, pooled text included, are that prompt's own first prediction."""
    other = "the red bird and a cat"
    reference, _ = answers(name, lambda p: p.cond, prompt=other)
    encoded: list[Any] = []

    class Encode(ac.Control):
        def context(self, text: Any, sampling: Any) -> Any:
            encoded.append(sampling.encode([other]))
            return text.change()

    found, _ = answers(name, lambda p: p.again(encoded[0].positive, pooled=encoded[0].pooled), Encode())
    # Masked families see the padding of text that they are handed.
    if name not in ("pixart", "sana"):
        torch.testing.assert_close(found, reference, atol=1e-4, rtol=1e-4)
    assert found.shape == reference.shape


@pytest.mark.parametrize("name", ["flux", "sd3", "qwen"])
def test_without_controls_there_is_no_text_of_regions(name: str) -> None:
    """EliGen puts text behind the prompt; a further prediction has none of it, in either branch."""

    def ask(prediction: Prediction) -> Any:
        return prediction.again(), prediction.again(branch="uncond")

    with_text, _ = answers(name, ask, ac.EliGen(REGIONS, entity_tokens=4))
    stock, _ = answers(name, lambda p: (p.cond, p.uncond))
    for found, expected in zip(with_text, stock, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


SCHEDULERS = {
    **tiny.SCHEDULERS,
    "ddim-v": lambda: DDIMScheduler(**tiny.BETAS, clip_sample=False, prediction_type="v_prediction"),
    "ddim-sample": lambda: DDIMScheduler(**tiny.BETAS, clip_sample=False, prediction_type="sample"),
    "euler-v": lambda: EulerDiscreteScheduler(**tiny.BETAS, prediction_type="v_prediction"),
}


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "lcm"])
def test_the_way_to_a_given_picture_ends_there(name: str) -> None:
    pipe = tiny.sd()
    pipe.scheduler = SCHEDULERS[name]()
    clean = torch.linspace(-1, 1, 4 * 16 * 16).reshape(1, 4, 16, 16)
    with ac.control(pipe, Guide(make=lambda p: p.toward(clean))):
        drawn = tiny.draw(pipe, steps=4)
    # DDIM and PNDM end a little before the schedule does: 0.03 of the noise is left.
    torch.testing.assert_close(drawn, clean, atol=0.15, rtol=0)
    assert (drawn - clean).abs().mean() < 0.03


@pytest.mark.parametrize("name", ["ddim", "euler", "dpm"])
def test_the_way_to_a_given_picture_is_its_noising(name: str) -> None:
    """After a step the latents are the picture with the predicted noise, as much as the scheduler itself would add."""
    pipe, predicted = tiny.sd(name), []
    clean = torch.linspace(-1, 1, 4 * 16 * 16).reshape(1, 4, 16, 16)
    guide = Guide(make=lambda p: (predicted.append(p.toward(clean)), predicted[-1])[1])
    with ac.control(pipe, guide), spied_steps(pipe) as steps:
        tiny.draw(pipe, steps=4)
    for i in (0, 1):
        expected = pipe.scheduler.add_noise(clean, predicted[i], pipe.scheduler.timesteps[i + 1 : i + 2])
        torch.testing.assert_close(steps[i][2], expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["flux", "sd3", "qwen", "sana", "zimage"])
def test_the_way_to_a_given_picture_under_rectified_flow(name: str) -> None:
    pipe, family, sizes = FAMILIES[name].make(), FAMILIES[name], []

    def make(prediction: Prediction) -> torch.Tensor:
        sizes.append(torch.full_like(prediction.cond, 0.25))
        return prediction.toward(sizes[-1])

    with ac.control(pipe, Guide(make=make)):
        drawn = draw(pipe, family, steps=3)
    torch.testing.assert_close(drawn, torch.full_like(drawn, 0.25), atol=1e-5, rtol=0)
