import numpy as np
import pytest
import torch

from attnctrl.shapes import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    SHAPES,
    Scene,
    Thing,
    render,
    sample_scene,
    scene_rng,
    thing_mask,
)
from attnctrl.shapes.world import MARGIN, SEPARATION


def scenes(count, **options):
    return [sample_scene(scene_rng(5, i), **options) for i in range(count)]


def test_held_out_leaves_one_pair_of_each_colour_and_shape():
    assert len(HELD_OUT) == 8
    assert {c for c, _ in HELD_OUT} == set(COLOURS)
    assert {s for _, s in HELD_OUT} == set(SHAPES)
    assert ("red", "square") in HELD_OUT


def test_scenes_repeat_by_seed_and_index():
    assert sample_scene(scene_rng(1, 7)) == sample_scene(scene_rng(1, 7))
    assert sample_scene(scene_rng(1, 7)) != sample_scene(scene_rng(1, 8))


@pytest.mark.parametrize(("held_out", "allowed"), [("never", {0}), ("one", {1}), ("any", {0, 1, 2, 3})])
def test_held_out_policy(held_out, allowed):
    counts = {sum(t.pair in HELD_OUT for t in s.things) for s in scenes(60, held_out=held_out)}
    assert counts <= allowed


def test_training_scenes_hold_one_to_three_things_apart_and_inside():
    drawn = scenes(200)
    assert {len(s.things) for s in drawn} == {1, 2, 3}
    assert {s.background for s in drawn} == set(BACKGROUNDS)
    for scene in drawn:
        assert len({t.pair for t in scene.things}) == len(scene.things)
        for i, a in enumerate(scene.things):
            assert 0.085 <= a.r <= 0.21
            assert min(a.cx, a.cy, 1 - a.cx, 1 - a.cy) >= MARGIN * a.r - 1e-9
            for b in scene.things[:i]:
                assert np.hypot(a.cx - b.cx, a.cy - b.cy) >= SEPARATION * (a.r + b.r) - 1e-9


def test_distinct_scenes_repeat_neither_colour_nor_shape():
    for scene in scenes(40, counts=4, distinct=True):
        assert len({t.colour for t in scene.things}) == len({t.shape for t in scene.things}) == 4


@pytest.mark.parametrize("shape", SHAPES)
def test_box_is_the_extent_of_what_is_drawn(shape):
    thing = Thing(shape, "red", 0.47, 0.55, 0.21)
    mask = thing_mask(thing, 400) > 0.5
    y, x = torch.where(mask)
    seen = (x.min() / 400, y.min() / 400, (x.max() + 1) / 400, (y.max() + 1) / 400)
    assert np.allclose([float(v) for v in seen], thing.box, atol=0.0051)


@pytest.mark.parametrize("shape", SHAPES)
def test_mask_area_does_not_depend_on_resolution_or_place(shape):
    coarse = thing_mask(Thing(shape, "red", 0.3, 0.31, 0.15), 96).mean()
    fine = thing_mask(Thing(shape, "red", 0.62, 0.5, 0.15), 500).mean()
    assert abs(coarse - fine) < 0.01 * fine


def test_render_draws_palette_on_ground_and_later_things_on_top():
    scene = Scene((Thing("square", "red", 0.5, 0.5, 0.3), Thing("circle", "blue", 0.5, 0.5, 0.1)), "white")
    image = render([scene, Scene((), "black")], size=64)
    assert image.shape == (2, 3, 64, 64)
    assert torch.allclose(image[0, :, 32, 32], torch.tensor([0.15, 0.32, 0.88]))
    assert torch.allclose(image[0, :, 32, 44], torch.tensor([0.86, 0.15, 0.15]))
    assert torch.allclose(image[0, :, 2, 2], torch.tensor([0.96, 0.96, 0.96]))
    assert image[1].max() < 0.1


def test_render_jitter_is_faint_and_repeats():
    drawn = scenes(4)
    clean, first, second = (render(drawn, 64, rng) for rng in (None, scene_rng(0, 0), scene_rng(0, 0)))
    assert torch.equal(first, second)
    assert 0 < (first - clean).abs().max() <= 0.061  # 0.025 of jitter and half of 0.05 along both axes


def test_things_may_leave_the_image():
    assert 0 < float(thing_mask(Thing("circle", "red", 0.0, 1.0, 0.2), 64).mean()) < 0.05


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown shape 'blob'"):
        Thing("blob", "red", 0.5, 0.5, 0.1)
    with pytest.raises(ValueError, match="unknown colour 'mauve'"):
        Thing("star", "mauve", 0.5, 0.5, 0.1)
    with pytest.raises(ValueError, match="unknown background"):
        Scene((), "plaid")
    with pytest.raises(ValueError, match="held_out must be"):
        sample_scene(scene_rng(0, 0), held_out="sometimes")
