"""Pictures of any size and mode in, the same size out."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import attnctrl as ac
from attnctrl.canvas import Canvas, feathered
from tests.editing.material import picture


def test_padding_repeats_the_edge_and_is_cut_off_again() -> None:
    given = picture(37, 50)
    canvas = Canvas.of(given, 8)
    assert canvas.padded.size == (40, 56)
    assert np.array_equal(np.asarray(canvas.padded)[:50, :37], np.asarray(given))
    assert (np.asarray(canvas.padded)[:50, 37:] == np.asarray(given)[:, -1:]).all()
    assert np.array_equal(np.asarray(canvas.finish(canvas.padded, None, 0)), np.asarray(given))


def test_outside_the_mask_every_byte_is_the_given_one() -> None:
    given, mask = picture(37, 50), np.zeros((50, 37), np.uint8)
    mask[10:20, 5:15] = 255
    canvas = Canvas.of(given, 8)
    drawn = Image.new("RGB", canvas.padded.size, (1, 2, 3))
    inside = canvas.mask(mask)
    for feather in (0, 4):
        done = np.asarray(canvas.finish(drawn, inside, feather))
        assert (done[10:20, 5:15] == (1, 2, 3)).all()
        far = np.ones((50, 37), bool)
        far[10 - feather : 20 + feather, 5 - feather : 15 + feather] = False
        assert np.array_equal(done[far], np.asarray(given)[far])
    soft = np.asarray(feathered(inside, 4)).astype(int)
    assert (np.diff(soft[15, 14:20]) <= 0).all()
    assert soft[15, 19] == 0


def test_modes_and_arrays() -> None:
    given = picture()
    grey = Canvas.of(given.convert("L"), 8)
    assert grey.picture.mode == "RGB"
    clear = given.copy()
    clear.putalpha(Image.linear_gradient("L").resize(given.size))
    done = Canvas.of(clear, 8).finish(given, None, 0)
    assert done.mode == "RGBA"
    assert np.array_equal(np.asarray(done)[..., 3], np.asarray(clear)[..., 3])
    floats = np.asarray(given) / 255
    assert np.array_equal(np.asarray(Canvas.of(floats, 8).picture), np.asarray(given))
    assert Canvas.of(np.asarray(given)[..., :1], 8).picture.size == given.size


def test_sixteen_bits_are_not_cut_off_at_eight() -> None:
    ramp = (np.arange(32 * 32).reshape(32, 32) * 64).astype(np.uint16)
    shown = np.asarray(Canvas.of(Image.fromarray(ramp), 8).picture)[..., 0]
    assert np.array_equal(shown, ramp >> 8)
    inside = np.asarray(Canvas.of(picture(), 8).mask(Image.fromarray(ramp))) > 0
    assert np.array_equal(inside, ramp > 32767)


def test_a_mask_is_turned_like_its_photograph(tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    area = np.zeros((24, 40), np.uint8)
    area[:, :10] = 255
    for name, one in (("picture", picture(40, 24)), ("mask", Image.fromarray(area))):
        one.save(tmp_path / f"{name}.png", exif=exif)
    canvas = Canvas.of(Image.open(tmp_path / "picture.png"), 8)
    inside = np.asarray(canvas.mask(Image.open(tmp_path / "mask.png"))) > 0
    assert np.array_equal(np.asarray(canvas.picture), np.rot90(np.asarray(picture(40, 24)), -1))
    assert np.array_equal(inside, np.rot90(area > 0, -1))


def test_a_photograph_taken_upright(tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(40, 24).save(tmp_path / "turned.png", exif=exif)
    assert Canvas.of(Image.open(tmp_path / "turned.png"), 8).picture.size == (24, 40)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (np.zeros((3, 8, 8, 3)), "has shape"),
        (np.zeros((2, 32, 32)), "has shape"),
        (np.full((32, 32, 3), 2.0), "outside 0..1"),
        (np.full((32, 32, 3), np.nan), "outside 0..1"),
        (np.zeros((32, 32, 3), np.int64), "of type int64"),
        (Image.new("RGB", (4, 40)), "less than one latent of 8x8"),
        (Image.new("I", (40, 40)), 'of mode "I", whose range is not known'),
        (Image.new("F", (40, 40)), 'of mode "F", whose range is not known'),
    ],
)
def test_what_is_no_picture(source, sentence: str) -> None:
    with pytest.raises(ac.ControlError, match=sentence):
        Canvas.of(source, 8)


def test_masks_of_other_sizes_are_scaled_and_of_other_shapes_refused() -> None:
    canvas = Canvas.of(picture(64, 32), 8)
    half = np.zeros((16, 32), np.uint8)
    half[:, :16] = 255
    assert np.asarray(canvas.mask(half))[:, :32].all()
    with pytest.raises(ac.ControlError, match="not the picture's aspect ratio"):
        canvas.mask(np.ones((40, 40)))
