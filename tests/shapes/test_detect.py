import numpy as np
import pytest
import torch
from PIL import Image

from attnctrl.shapes import Scene, Thing, detect, render, sample_scene, scene_rng
from attnctrl.shapes.components import components, dilate, erode
from attnctrl.shapes.score import box_iou, extra, match


@pytest.mark.parametrize("size", [96, 128, 256])
def test_renders_are_read_without_error(size):
    ious = []
    for i in range(60 if size == 128 else 12):
        rng = scene_rng(11, i)
        scene = sample_scene(rng, counts=1 + i % 4, held_out="any")
        found = detect(render([scene], size, rng)[0])
        asked = [(t.shape, t.colour) for t in scene.things]
        matched = match(asked, found, [t.box for t in scene.things])
        assert None not in matched, f"scene {i}: {scene} read as {found}"
        assert extra(asked, found) == 0
        assert found.background == scene.background
        ious += [box_iou(f.box, t.box) for f, t in zip(matched, scene.things, strict=True)]
    assert np.mean(ious) > 0.94


def test_every_input_form_gives_the_same():
    image = render([Scene((Thing("star", "cyan", 0.4, 0.6, 0.15),), "beige")])[0]
    bytes_ = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    forms = [image, image.numpy(), image.permute(1, 2, 0), bytes_, Image.fromarray(bytes_)]
    boxes = [detect(form).objects[0].box for form in forms]
    assert len(set(boxes)) == 1


def test_found_fields():
    thing = Thing("diamond", "pink", 0.3, 0.6, 0.17)
    (found,) = detect(render([Scene((thing,), "gray")])[0]).objects
    assert (found.shape, found.colour) == ("diamond", "pink")
    assert np.allclose(found.centre, (0.3, 0.6), atol=0.01)
    assert found.mask.shape == (128, 128)
    assert found.score > 0.85


def test_an_empty_image_has_no_objects():
    found = detect(render([Scene((), "black")])[0])
    assert found.objects == []
    assert found.background == "black"


def test_touching_things_of_different_colour_are_two():
    scene = Scene((Thing("square", "red", 0.35, 0.5, 0.18), Thing("square", "blue", 0.65, 0.5, 0.18)), "white")
    assert {(f.colour, f.shape) for f in detect(render([scene])[0]).objects} == {("red", "square"), ("blue", "square")}


def test_not_an_image():
    with pytest.raises(ValueError, match="expected one image"):
        detect(np.zeros((2, 3, 8, 8)))


def test_components_and_morphology():
    mask = np.zeros((8, 9), dtype=bool)
    mask[1:4, 1:4] = mask[4, 4] = mask[6, 1:3] = True  # (4, 4) touches the block by a corner
    mask[1:6, 7] = mask[5, 6:8] = True
    parts = components(mask)
    assert sorted(len(y) for y, _ in parts) == [2, 6, 10]
    assert sum(len(y) for y, _ in parts) == mask.sum()
    assert erode(mask).sum() == 1
    assert dilate(erode(mask))[1:4, 1:4].all()
    assert components(np.zeros((4, 4), dtype=bool)) == []
