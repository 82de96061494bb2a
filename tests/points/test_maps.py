"""Recorded maps: what they are, and of whom."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

import attnctrl as ac
from attnctrl.maps import Maps
from attnctrl.sites import Call
from tests import tiny
from tests.probes import REGIONS, Mask


def test_maps_are_those_of_the_conditional_branch() -> None:
    """A recorded map is the share of attention that the phrase's token gets, over heads and sites of one grid."""
    pipe, kept = tiny.sd(), {}

    def keep(call: Call) -> None:
        if call.queries.grid == (1, 8, 8):
            probs = (call.query @ call.key.transpose(-1, -2) * call.scale).softmax(dim=-1)
            kept[call.site.name] = probs.mean(dim=1)[0]

    with ac.control(pipe, Mask(make=keep), record=["dog"]) as run:
        tiny.draw(pipe, steps=1)
    (position,) = run.sampling.find("dog")
    expected = torch.stack([probs[:, position] for probs in kept.values()]).mean(dim=0)
    assert len(kept) == 4
    torch.testing.assert_close(run.maps["dog"], expected.reshape(1, 8, 8))


def test_every_region_of_a_batch_has_its_map() -> None:
    pipe = tiny.sd()
    with ac.control(pipe, ac.RegionMask(REGIONS, weight=0.5)) as run:
        tiny.draw(pipe, ["a cat and a dog", "a dog and a cat"], num_images_per_prompt=2, steps=2)
    assert run.maps.phrases == ("cat", "dog")
    for image in range(4):
        cat, dog = run.maps.of("cat", image), run.maps.of("dog", image)
        assert cat.shape == (2, 8, 8)  # of 16x16 latents, the level nearest to 1/16
        assert cat.dtype == torch.float32
        # The mask acted: each phrase is seen more on its own side.
        assert cat[..., :4].mean() > 5 * cat[..., 4:].mean()
        assert dog[..., 4:].mean() > 5 * dog[..., :4].mean()


def test_recording_can_be_chosen() -> None:
    pipe = tiny.sd()
    with ac.control(pipe, ac.RegionMask(REGIONS), record=False) as run:
        tiny.draw(pipe, steps=1)
    assert len(run.maps) == 0
    with ac.control(pipe, ac.RegionMask(REGIONS), record="a cat") as run:
        tiny.draw(pipe, steps=1)
    assert run.maps.phrases == ("a cat", "cat", "dog")
    assert "a cat" in run.maps
    with pytest.raises(KeyError, match=r'no maps of "bird".*recorded: "a cat", "cat", "dog"'):
        run.maps["bird"]


def test_a_phrase_to_record_must_be_in_the_prompt() -> None:
    pipe = tiny.sd()
    with (
        pytest.raises(ac.ControlError, match=r'"bird" is not in the prompt.*2:cat.*5:dog'),
        ac.control(pipe, record=["bird"]),
    ):
        tiny.draw(pipe, steps=1)


def test_heat_is_the_mean_over_layers_and_steps_at_picture_size() -> None:
    maps = Maps(("cat", "dog"), torch.ones(1, 2, 4, dtype=torch.bool))
    grid = (1, 2, 2)
    for step, site, value in ((0, "a", 0.1), (0, "b", 0.3), (1, "a", 0.4), (1, "b", 0.4)):
        cat = torch.full((1, 1, 4), value)
        maps.add(step, site, torch.cat([cat, torch.tensor([[[0.0, 0.0, 0.0, 8 * value]]])], dim=1), grid)
    heat = maps.heat("cat", size=(6, 4))
    assert heat.shape == (4, 6)  # (height, width) of (width, height)
    torch.testing.assert_close(heat, torch.full((4, 6), 0.3))
    corner = maps.heat("dog", size=(2, 2))
    torch.testing.assert_close(corner, torch.tensor([[0.0, 0.0], [0.0, 2.4]]))
    # Bicubic weights reach below 0 beside a peak; a share of attention does not.
    assert maps.heat("dog", size=(16, 16)).min() == 0
    assert maps.heat("dog", size=(16, 16))[12:, 12:].min() > 1


def test_overlays_are_of_the_pictures_size() -> None:
    maps = Maps(("cat", "dog"), torch.ones(1, 2, 4, dtype=torch.bool))
    maps.add(0, "a", torch.tensor([[[0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]]]), (1, 2, 2))
    picture = Image.new("RGB", (40, 24), (100, 100, 100))
    assert maps.overlay(picture, "cat").size == picture.size
    assert maps.overlay(picture, "cat", strength=0).tobytes() == picture.tobytes()
    bright, dark = maps.overlay(picture, "cat").convert("L"), maps.overlay(picture, "dog").convert("L")
    assert bright.getpixel((38, 22)) > dark.getpixel((38, 22)) + 50
    every = maps.overlays(picture, columns=2)
    assert every.width == 2 * 40 + 3 * 10
    assert every.height > 2 * 24
