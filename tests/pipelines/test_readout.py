"""ReadoutPipeline: given pictures in, what their attention says out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import attnctrl as ac
from attnctrl.bench.readout import exact_masks, mask_iou, picture
from attnctrl.bench.tasks import make_tasks
from attnctrl.pipelines import ReadoutPipeline
from tests import tiny
from tests.editing.material import picture as given
from tests.spies import assert_restored, snapshot


def test_given_pictures_are_read_and_the_pipeline_is_left_alone() -> None:
    pipe = tiny.sd()
    before = snapshot(pipe)
    readout = ReadoutPipeline(pipe)
    segments = readout.segment(
        [given(), given(32, 32)], ["a cat", "a dog and a cat"], [["cat"], ["dog", "cat"]], steps=4
    )
    assert segments.maps.shape == (2, 2, 32, 32)
    assert segments.mask("cat", 1).size == (32, 32)
    # Another picture gives other maps under the same prompt and noise.
    black = readout.segment(Image.new("RGB", (32, 32)), "a cat", ["cat"], steps=4)
    again = readout.segment(Image.new("RGB", (32, 32)), "a cat", ["cat"], steps=4)
    other = readout.segment(given(), "a cat", ["cat"], steps=4)
    assert torch.equal(black.maps, again.maps)
    assert not torch.allclose(black.maps, other.maps, atol=1e-3)
    labels = np.zeros((32, 32), dtype=int)
    labels[8:16, 8:16] = 1
    parts = readout.learn(given(), labels, prompt="cat", steps=4, iterations=1)
    assert parts.embeddings.shape == (1, 16)
    assert readout.segment_like([given(), given()], parts, steps=4, presence=0.0).shape == (2, 32, 32)
    x, y = readout.correspond(given(), (0.4, 0.4), given(), steps=4, iterations=1, attempts=2)
    assert 0 < x < 1
    assert 0 < y < 1
    assert_restored(before, pipe)


def test_a_picture_that_is_no_whole_latents_is_refused() -> None:
    readout = ReadoutPipeline(tiny.sd())
    with pytest.raises(ac.ControlError, match=r"sizes 33x32: all must have the same, .* multiples of"):
        readout.segment(Image.new("RGB", (33, 32)), "a cat")
    with pytest.raises(ac.ControlError, match=r"labels have the shape \(4, 4\), and the picture has 32 rows"):
        readout.learn(given(), np.ones((4, 4), dtype=int))


@pytest.mark.slow
def test_shapes_are_found_in_rendered_pictures() -> None:
    """On a trained model the masks of the nouns are those of the shapes, and a part is found by its example."""
    readout = ReadoutPipeline.from_pretrained("shapes-sd", device="cpu")
    readout.pipe.set_progress_bar_config(disable=True)
    tasks = make_tasks(2, 2, "tune")
    pictures, exact = [picture(t) for t in tasks], [exact_masks(t) for t in tasks]
    read = readout.segment(pictures, [t.prompt for t in tasks], [t.nouns for t in tasks])
    assert np.mean([mask_iou(read.masks[i, k], exact[i][k]) for i in range(2) for k in range(2)]) > 0.6
