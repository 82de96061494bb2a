"""LayoutPipeline: the same pictures as the controls by hand, with names and parameters for people."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnctrl as ac
from attnctrl.pipelines import LayoutPipeline
from tests import tiny
from tests.probes import REGIONS
from tests.spies import assert_restored, snapshot
from tests.transformers import FLUX

HALF = ac.Window(0, 0.5)


def draw(layout: LayoutPipeline, *args: Any, prompt: Any = tiny.PROMPT, **kwargs: Any) -> Any:
    given = {"num_inference_steps": 3, "height": 32, "width": 32, "output_type": "latent", "guidance_scale": 4.0}
    generator = torch.Generator().manual_seed(7)
    return layout(prompt, *args, generator=generator, **{**given, **kwargs})


def by_hand(*controls: ac.Control) -> torch.Tensor:
    pipe = tiny.sd()
    with ac.control(pipe, *controls):
        return tiny.draw(pipe)


def test_none_is_the_stock_picture() -> None:
    layout = LayoutPipeline(tiny.sd())
    assert torch.equal(draw(layout, REGIONS, method="none").images, tiny.draw(tiny.sd()))


@pytest.mark.parametrize(
    ("method", "overrides", "controls"),
    [
        ("region-mask", {}, (ac.RegionMask(REGIONS),)),
        (
            "region-mask",
            {"boost": 1.0, "window": HALF},
            (ac.RegionMask(REGIONS, boost=1.0, window=HALF),),
        ),
        (ac.RegionPrompts(REGIONS), {}, (ac.RegionPrompts(REGIONS),)),
        (["loco", "region-mask"], {"boost": 1.0}, (ac.LoCo(REGIONS), ac.RegionMask(REGIONS, boost=1.0))),
        (
            {"loco": {"scale": 3.0}, "region-mask": {"boost": 1.0}},
            {"boost": 2.0},
            (ac.LoCo(REGIONS, scale=3.0), ac.RegionMask(REGIONS, boost=1.0)),
        ),
        (["none", ac.RegionMask(REGIONS)], {}, (ac.RegionMask(REGIONS),)),
    ],
)
def test_methods_by_name_are_the_controls(method: Any, overrides: dict[str, Any], controls: tuple) -> None:
    layout = LayoutPipeline(tiny.sd())
    result = draw(layout, REGIONS, method, **overrides)
    assert torch.equal(result.images, by_hand(*controls))
    assert [type(c) for c in result.run.controls] == [type(c) for c in controls]


def test_guidance_means_the_same_by_any_name() -> None:
    layout = LayoutPipeline(tiny.sd())
    expected = draw(layout, REGIONS, method="none", guidance_scale=2.0).images
    given = {"num_inference_steps": 3, "height": 32, "width": 32, "output_type": "latent"}
    generator = torch.Generator().manual_seed(7)
    drawn = layout(tiny.PROMPT, REGIONS, "none", guidance=2.0, generator=generator, **given).images
    assert torch.equal(drawn, expected)


def test_a_flux_class_pipeline_is_called_as_it_wants() -> None:
    pipe = FLUX.make()
    layout = LayoutPipeline(pipe)
    assert "eligen" in layout.methods
    assert "loco" in layout.methods
    size = {"height": FLUX.size[0], "width": FLUX.size[1], **FLUX.more}
    shared = {"num_inference_steps": 2, "output_type": "latent", **size}
    given = {"entity_tokens": 4, "guidance": 3.0, "generator": generators()}
    result = layout([tiny.PROMPT] * 2, REGIONS, "eligen", **given, **shared)
    guided = {"true_cfg_scale": 3.0, "negative_prompt": ["", ""]}
    with ac.control(pipe, ac.EliGen(REGIONS, entity_tokens=4)):
        expected = pipe([tiny.PROMPT] * 2, generator=generators(), **guided, **shared).images
    assert torch.equal(result.images, expected)


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (1, 2)]


def test_the_result_carries_maps_losses_and_report() -> None:
    pipe = tiny.sd()
    before = snapshot(pipe)
    result = draw(LayoutPipeline(pipe), REGIONS, "loco", window=ac.Window(0.0, 1.0), record=["a cat"])
    assert result.run.maps["a cat"].shape[0] == 3
    assert {loss.step for loss in result.run.losses} == {0, 1, 2}
    assert "LoCo" in str(result.run.report)
    assert result.output.images is result.images
    assert_restored(before, pipe)


def test_a_batch_takes_regions_for_each_prompt() -> None:
    lists = (REGIONS, (ac.Region("dog", box=(0.2, 0.2, 0.8, 0.8)),))
    result = draw(
        LayoutPipeline(tiny.sd()), lists, "region-mask", prompt=[tiny.PROMPT, "a dog"], num_images_per_prompt=2
    )
    assert result.images.shape[0] == 4


@pytest.mark.parametrize(
    ("method", "overrides", "sentence"),
    [
        ("locco", {}, r'method "locco" is unknown: choose one of region-mask'),
        ("a-star", {}, r'method "a-star" belongs to the task fidelity, not to layout'),
        ("loco", {"boost": 1.0}, r'"boost" is no parameter of loco nor of the pipeline: known are alpha'),
        ("none", {"boost": 1.0}, r'"boost" is no parameter of no method nor of the pipeline: known are none'),
        (
            ["loco", "refocus"],
            {"scale": 1.0},
            r'"scale" belongs to loco and refocus: make the controls yourself',
        ),
        ("loco", {"scale": -1.0}, r"LoCo: scale is -1.0: it must be in \[0, 1000\]"),
    ],
)
def test_bad_requests_end_with_a_sentence(method: Any, overrides: dict[str, Any], sentence: str) -> None:
    pipe = tiny.sd()
    before = snapshot(pipe)
    with pytest.raises(ac.ControlError, match=sentence):
        draw(LayoutPipeline(pipe), REGIONS, method, **overrides)
    assert_restored(before, pipe)


def test_an_overlay_of_each_picture_in_one_call() -> None:
    layout = LayoutPipeline(tiny.sd())
    result = draw(layout, REGIONS, "region-mask", output_type="pil", num_images_per_prompt=2)
    assert result.overlay("cat", 1).size == result.images[1].size
    assert result.overlay("cat", 1).tobytes() != result.overlay("dog", 1).tobytes()
    with pytest.raises(KeyError, match=r'no maps of "bird"'):
        result.overlay("bird")
