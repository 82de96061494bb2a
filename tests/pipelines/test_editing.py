"""EditPipeline, from the given picture to the edited one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

import attnctrl as ac
from attnctrl.edits import edited
from attnctrl.pipelines import EditPipeline
from tests import tiny
from tests.editing.material import EDIT, SOURCE, picture
from tests.spies import assert_restored, snapshot
from tests.transformers import FAMILIES

MASK = np.zeros((32, 32), np.uint8)
MASK[8:16, 8:16] = 255
STEPS: dict[str, Any] = {"num_inference_steps": 3, "guidance": 4.0}


@pytest.mark.parametrize(
    "method", ["none", "prompt-to-prompt", "mutual-self-attention", "ale-edit", "inpaint-fusion", "plug-and-play"]
)
@pytest.mark.parametrize("inversion", ["direct", "virtual", "edit-friendly"])
def test_outside_a_mask_the_given_pixels_stay_byte_for_byte(method: str, inversion: str) -> None:
    pipe, given = tiny.sd(), picture()
    before = snapshot(pipe)
    edits = [ac.Edit("cat", "bird", MASK)]
    result = EditPipeline(pipe)(given, SOURCE, edits=edits, method=method, inversion=inversion, feather=2, **STEPS)
    (image,) = result.images
    outside = np.ones((32, 32), bool)
    outside[6:18, 6:18] = False
    assert np.array_equal(np.asarray(image)[outside], np.asarray(given)[outside])
    assert not np.array_equal(np.asarray(image), np.asarray(given))
    assert result.prompt == EDIT
    assert_restored(before, pipe)


@pytest.mark.parametrize("family", ["flux", "sd3", "qwen"])
def test_flows_at_a_size_that_is_not_whole_latents(family: str) -> None:
    entry = FAMILIES[family]
    given = picture(30, 25)
    result = EditPipeline(entry.make())(
        given, SOURCE, EDIT, method="mutual-self-attention", inversion="virtual", **{**STEPS, "guidance": None}
    )
    assert result.images[0].size == result.reconstruction.size == (30, 25)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_pictures_of_every_mode_with_a_mask_of_another_size(mode: str) -> None:
    given = picture(36, 30).convert(mode)
    if mode == "RGBA":
        given.putalpha(Image.linear_gradient("L").resize(given.size))
    half = np.zeros((15, 18), np.uint8)
    half[:, :6] = 255
    (image,) = EditPipeline(tiny.sd())(given, SOURCE, EDIT, mask=half, inversion="virtual", feather=0, **STEPS).images
    assert image.size == (36, 30)
    assert image.mode == ("RGBA" if mode in ("LA", "RGBA") else "RGB")
    assert np.array_equal(np.asarray(image)[:, 12:, :3], np.asarray(given.convert("RGB"))[:, 12:])
    assert not np.array_equal(np.asarray(image)[:, :12, :3], np.asarray(given.convert("RGB"))[:, :12])


def test_a_picture_far_larger_than_the_models_own_is_refused_before_anything_is_drawn() -> None:
    pipe = tiny.sd()
    with pytest.raises(ac.ControlError, match="130x127 pixels, more than 16 times the 32x32"):
        EditPipeline(pipe)(picture(130, 127), SOURCE, EDIT, **STEPS)
    large = EditPipeline(pipe)(picture(128, 90), SOURCE, EDIT, method="none", inversion="virtual", **STEPS)
    assert large.images[0].size == (128, 90)


def test_it_repeats_and_counts() -> None:
    edit = EditPipeline(tiny.sd())
    first = edit(picture(), SOURCE, EDIT, inversion="virtual", num_images_per_prompt=2, seed=5, **STEPS)
    again = edit(picture(), SOURCE, EDIT, inversion="virtual", num_images_per_prompt=2, seed=5, **STEPS)
    other = edit(picture(), SOURCE, EDIT, inversion="virtual", seed=6, **STEPS)
    assert len(first.images) == 2
    assert first.images[0].tobytes() == again.images[0].tobytes() != first.images[1].tobytes()
    assert other.images[0].tobytes() == first.images[1].tobytes()


def test_parameters_reach_the_method_and_the_pipeline() -> None:
    edit = EditPipeline(tiny.sd())
    result = edit(picture(), SOURCE, EDIT, self_until=0.0, negative_prompt=["dog"] * 2, record=["dog"], **STEPS)
    assert "PromptToPrompt" in str(result.run.report)
    assert result.run.maps["dog"].shape[0] == 3
    assert "prompt-to-prompt" in edit.methods


def test_edits_of_a_prompt() -> None:
    swap = [ac.Edit("cat", "dog"), ac.Edit("dog", "cat")]
    assert edited("a cat and a dog", swap) == "a dog and a cat"
    with pytest.raises(ac.ControlError, match="nothing to edit"):
        edited(SOURCE, [])
    with pytest.raises(ac.ControlError, match='"car" are not in the source prompt'):
        edited(SOURCE, [ac.Edit("car", "dog")])
    with pytest.raises(ac.ControlError, match="change the same words"):
        edited(SOURCE, [ac.Edit("a cat", "x"), ac.Edit("cat", "y")])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"method": "loco"}, "belongs to the task layout"),
        ({"method": "magic"}, "is unknown"),
        ({"inversion": "magic"}, "choose one of"),
        ({"banana": 1}, "is no parameter of prompt-to-prompt"),
        ({"mask": np.zeros((32, 32))}, "mask"),
        ({"mask": np.ones((32, 64))}, "aspect ratio"),
        ({"method": "ale-edit", "edits": [ac.Edit("cat", "bird")]}, "needs a mask for every edit"),
        ({"method": "ale-edit"}, '"ale-edit" has nothing to do in this edit'),
        ({"method": ["prompt-to-prompt", "inpaint-fusion"]}, '"inpaint-fusion" has nothing to do in this edit'),
        ({"method": "design-edit"}, '"design-edit" has nothing to do in this edit'),
        ({"method": "focus-on-instruction"}, "such as masks, layers or instructions"),
    ],
)
def test_bad_input(options: dict[str, Any], sentence: str) -> None:
    pipe = tiny.sd()
    before = snapshot(pipe)
    with pytest.raises(ac.ControlError, match=sentence):
        EditPipeline(pipe)(picture(), SOURCE, EDIT, **STEPS, **options)
    assert_restored(before, pipe)


def test_the_given_picture_is_not_touched() -> None:
    given = picture()
    kept = given.tobytes()
    EditPipeline(tiny.sd())(given, SOURCE, EDIT, mask=Image.fromarray(MASK), **STEPS)
    assert given.tobytes() == kept
