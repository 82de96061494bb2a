"""InstructPipeline: a picture and an instruction, with and without a first pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import attnctrl as ac
from attnctrl.pipelines import InstructPipeline
from tests import tiny
from tests.editing.material import picture
from tests.spies import assert_restored, snapshot, watched


@pytest.fixture(scope="module")
def edit() -> InstructPipeline:
    return InstructPipeline(tiny.instruct())


def call(edit: InstructPipeline, **kwargs: Any) -> Any:
    return edit(picture(30, 32), tiny.PROMPT, num_inference_steps=4, guidance=4.0, **kwargs)


def test_methods_by_name_and_the_pictures_size(edit: InstructPipeline) -> None:
    before = snapshot(edit.pipe)
    stock = call(edit)
    assert stock.images[0].size == (30, 32)
    assert stock.region is None
    focus = call(edit, method="focus-on-instruction", phrases=["cat"], threshold=0.5)
    assert focus.images[0].tobytes() != stock.images[0].tobytes()
    assert {row.control for row in focus.run.report.rows.values()} == {"FocusOnInstruction"}
    assert call(edit).images[0].tobytes() == stock.images[0].tobytes()
    assert_restored(before, edit.pipe)


def test_lime_in_two_passes(edit: InstructPipeline) -> None:
    with watched(edit.pipe) as seen:
        result = call(edit, method="lime", find_guidance=5.0, find_at=0.5)
    # Two steps find the region, four draw.
    assert len(seen.samples) == 6
    assert torch.equal(seen.samples[0], seen.samples[2])
    assert result.region.shape == (16, 15)
    assert result.region.any()
    steps = {row.point: row.steps for row in result.run.report.rows.values()}
    assert steps["mask"] == {0, 1, 2, 3}
    with pytest.raises(ac.ControlError, match="is for Lime without a region"):
        call(edit, find_guidance=5.0)


def test_outside_a_mask_are_the_given_pixels(edit: InstructPipeline) -> None:
    given, mask = picture(30, 32), np.zeros((32, 30), bool)
    mask[8:20, 10:22] = True
    free, held = (np.asarray(call(edit, mask=m, feather=0).images[0]) for m in (None, mask))
    assert np.array_equal(held[mask], free[mask])
    assert np.array_equal(held[~mask], np.asarray(given)[~mask])
    assert not np.array_equal(held[mask], np.asarray(given)[mask])
    soft = np.asarray(call(edit, mask=mask, feather=2).images[0])
    far = np.ones_like(mask)
    far[6:22, 8:24] = False
    assert np.array_equal(soft[far], np.asarray(given)[far])
    with pytest.raises(ac.ControlError, match="the mask is all zero"):
        call(edit, mask=np.zeros((32, 30), bool))


def test_several_pictures(edit: InstructPipeline) -> None:
    images = call(edit, num_images_per_prompt=2).images
    assert [one.size for one in images] == [(30, 32)] * 2
    assert images[0].tobytes() != images[1].tobytes()


def test_other_pipelines_are_refused() -> None:
    with pytest.raises(ac.ControlError, match="needs an InstructPix2Pix pipeline, and got StableDiffusionPipeline"):
        InstructPipeline(tiny.sd())
