"""What a region may be made of, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

import attnctrl as ac
from attnctrl.regions import RASTERS


def region(**shape: Any) -> ac.Region:
    return ac.Region("cat", **shape)


# masks of every kind -----------------------------------------------------------------------------------------------
def test_masks_of_every_kind_mean_the_same() -> None:
    inside = np.zeros((12, 16), dtype=bool)
    inside[2:9, 3:11] = True
    bytes_ = inside.astype(np.uint8) * 255
    picture = Image.fromarray(bytes_)
    red = Image.new("RGB", (16, 12))
    ImageDraw.Draw(red).rectangle((3, 2, 10, 8), fill=(255, 255, 255))
    alpha = Image.new("LA", (16, 12), (255, 0))
    ImageDraw.Draw(alpha).rectangle((3, 2, 10, 8), fill=(0, 255))
    kinds = {
        "bool": inside,
        "uint8 0/255": bytes_,
        "uint8 0/1": inside.astype(np.uint8),
        "float": inside.astype(np.float32),
        "soft float": np.where(inside, 0.9, 0.2),
        "float 0..255": inside * 255.0,
        "channel last": bytes_[..., None],
        "batch of one": inside[None, None],
        "torch bool": torch.from_numpy(inside),
        "torch float": torch.from_numpy(inside).float()[None],
        "torch bfloat16": torch.from_numpy(inside).bfloat16(),
        "torch with gradient": torch.from_numpy(inside).float().requires_grad_(True),
        "torch uint8": torch.from_numpy(bytes_),
        "nested lists": inside.tolist(),
        "PIL L": picture,
        "PIL 1": picture.convert("1"),
        "PIL RGB": red,
        "PIL LA": alpha,
    }
    expected = region(mask=inside).raster(5, 7)
    assert 0 < expected.mean() < 1
    for kind, mask in kinds.items():
        assert torch.equal(region(mask=mask).raster(5, 7), expected), kind


BAD_MASKS: dict[str, tuple[Any, str]] = {
    "zero": (np.zeros((4, 4)), r"mask is all zero"),
    "black picture": (Image.new("L", (8, 8)), r"mask is all zero"),
    "below half": (np.full((4, 4), 0.4), r"mask is all zero"),
    "nan": (np.array([[1.0, np.nan], [0.0, 1.0]]), r"mask holds NaN or infinite"),
    "infinite": (torch.tensor([[1.0, float("inf")]] * 2), r"mask holds NaN or infinite"),
    "three channels": (np.ones((4, 4, 3)), r"mask has shape \(4, 4, 3\): give one channel"),
    "channels first": (torch.ones(3, 4, 4), r"mask has shape \(3, 4, 4\)"),
    "one row of numbers": (np.ones(4), r"mask has shape \(4,\)"),
}


@pytest.mark.parametrize("kind", BAD_MASKS)
def test_masks_that_cannot_be_used(kind: str) -> None:
    mask, sentence = BAD_MASKS[kind]
    with pytest.raises(ac.ControlError, match=rf'region "cat".*{sentence}'):
        region(mask=mask)


BAD_BOXES: dict[str, tuple[Any, str]] = {
    "left of the picture": ((-0.1, 0, 1, 1), r"reaches outside 0\.\.1"),
    "pixels": ((10, 10, 200, 200), r"reaches outside 0\.\.1"),
    "reversed in x": ((0.8, 0.1, 0.2, 0.9), r"empty or reversed"),
    "reversed in y": ((0.1, 0.9, 0.2, 0.1), r"empty or reversed"),
    "empty": ((0.3, 0.1, 0.3, 0.9), r"empty or reversed"),
    "nan": ((0, 0, float("nan"), 1), r"four finite numbers"),
    "infinite": ((0, 0, float("inf"), 1), r"four finite numbers"),
    "three numbers": ((0, 0, 1), r"four finite numbers"),
    "words": (("a", "b", "c", "d"), r"four finite numbers"),
    "one number": (0.5, r"four finite numbers"),
}


@pytest.mark.parametrize("kind", BAD_BOXES)
def test_boxes_that_cannot_be_used(kind: str) -> None:
    box, sentence = BAD_BOXES[kind]
    with pytest.raises(ac.ControlError, match=rf'region "cat".*{sentence}'):
        region(box=box)


@given(st.tuples(*[st.floats(allow_nan=True, allow_infinity=True)] * 4))
def test_a_box_is_either_fine_or_refused(box: Any) -> None:
    x0, y0, x1, y1 = box
    if 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1:
        assert region(box=box).box == box
    else:
        with pytest.raises(ac.ControlError, match='region "cat"'):
            region(box=box)


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "no shape": ({"phrase": "cat"}, r"exactly one of box, mask and polygon"),
    "two shapes": ({"phrase": "cat", "box": (0, 0, 1, 1), "mask": np.ones((2, 2))}, r"exactly one of"),
    "no phrase": ({"phrase": " ", "box": (0, 0, 1, 1)}, r"needs a phrase"),
    "a number": ({"phrase": 5, "box": (0, 0, 1, 1)}, r"needs a phrase"),
    "weight": ({"phrase": "cat", "box": (0, 0, 1, 1), "weight": -1.0}, r"weight -1\.0 must be 0 or more"),
    "nan weight": ({"phrase": "cat", "box": (0, 0, 1, 1), "weight": float("nan")}, r"weight nan must be"),
    "two points": ({"phrase": "cat", "polygon": [(0, 0), (1, 1)]}, r"at least three \(x, y\) points"),
    "point outside": ({"phrase": "cat", "polygon": [(0, 0), (1, 1), (2, 0)]}, r"values in 0\.\.1"),
    "flat point": ({"phrase": "cat", "polygon": [(0, 0), (1, 1), (0.5,)]}, r"at least three \(x, y\)"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_things_that_cannot_be_used(kind: str) -> None:
    fields, sentence = OTHERS[kind]
    with pytest.raises(ac.ControlError, match=sentence):
        ac.Region(**fields)


def test_unknown_rasters() -> None:
    with pytest.raises(ac.ControlError, match=rf'raster "bilinear" is unknown: choose one of {", ".join(RASTERS)}'):
        region(box=(0, 0, 1, 1)).raster(4, 4, "bilinear")


@pytest.mark.parametrize(
    ("mask", "picture", "fits"),
    [
        ((32, 32), (16, 16), True),
        ((64, 64), (15, 15), True),
        ((30, 44), (15, 22), True),
        ((31, 44), (15, 22), True),  # one pixel of rounding
        ((64, 32), (16, 16), False),
        ((32, 64), (64, 32), False),
        ((512, 768), (64, 64), False),
    ],
)
def test_masks_must_have_the_aspect_ratio_of_the_picture(mask: Any, picture: Any, fits: bool) -> None:
    one = region(mask=np.ones(mask))
    if fits:
        one.check_aspect(*picture)
    else:
        with pytest.raises(ac.ControlError, match=rf"the mask is {mask[1]}x{mask[0]} pixels.*aspect ratio"):
            one.check_aspect(*picture)
    region(box=(0, 0, 1, 1)).check_aspect(*picture)  # boxes and polygons are fractions: they always fit
    region(polygon=[(0, 0), (1, 0), (1, 1)]).check_aspect(*picture)
