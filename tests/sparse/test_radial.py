"""Radial attention's blocks against the counts of the official code, and its rule worked out by hand."""

from __future__ import annotations

import pytest
import torch

from attnctrl.controls.sparse.radial import band_blocks, half_width, radial_blocks


@pytest.mark.parametrize(
    ("frames", "tokens", "decay", "sink", "count"),
    [
        (18, 3840, 0.2, 1, 83728),
        (30, 3840, 0.95, 0, 222452),
        (8, 256, 1.0, 1, 232),
        (8, 256, 1.0, 0, 224),
        (8, 128, 1.0, 0, 42),
        (16, 128, 1.0, 0, 114),
        (4, 512, 0.5, 0, 220),
        (4, 256, 1.0, 1, 64),
    ],
)
def test_as_many_blocks_as_in_the_official_code(frames: int, tokens: int, decay: float, sink: int, count: int) -> None:
    assert int(radial_blocks(frames, tokens, decay, 128, sink).sum()) == count


def test_the_half_widths_of_the_published_settings() -> None:
    def widths(decay: float) -> list[int]:
        return [int(half_width(distance, 3840, decay, 128) or 0) for distance in (1, 2, 3, 4, 7, 8, 15, 16)]

    assert widths(0.95) == [3840, 972, 972, 486, 486, 243, 243, 128]
    assert widths(0.2) == [3840, 204, 204, 128, 128, 128, 128, 128]
    assert widths(0.8) == [3840, 819, 819, 409, 409, 204, 204, 128]


def test_neighbours_and_floors_are_settings() -> None:
    def widths(whole: int, floor: float) -> list[float | None]:
        return [half_width(distance, 64, 0.125, 16, whole, floor) for distance in (0, 1, 2, 4)]

    assert widths(1, 1.0) == [64.0, 64.0, 16.0, 16.0]
    assert widths(0, 0.5) == [64.0, 8.0, 8.0, 8.0]
    assert widths(-1, 0.0) == [16.0, 8.0, 4.0, 2.0]


def test_frames_that_are_far_apart_are_seen_now_and_then() -> None:
    # 128 tokens: L = 256, 128, 64, 64, 32, 32, 32, 32 at distances 0 to 7, and every second, then every fourth frame.
    kept = [half_width(distance, 128, 1.0, 128) is not None for distance in range(8)]
    assert kept == [True, True, True, False, True, False, False, False]


def test_a_band_fills_the_blocks_that_it_crosses_enough() -> None:
    # Blocks of 16, |query - key| <= 4. On the diagonal a column of a block has 5 to 9 rows of 16, and but two of the 16
    # columns (the outermost, with 5) more than a third. Beside it 4 columns are met, with 1 to 4 rows.
    assert torch.equal(band_blocks(48, 4.0, 16), torch.eye(3, dtype=torch.bool))
    # |query - key| <= 16: beside the diagonal 16 columns are met with 1 to 16 rows, 11 of them with 6 or more.
    wide = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]], dtype=torch.bool)
    assert torch.equal(band_blocks(48, 16.0, 16), wide)
    # With 15 there are 15 columns, of which 10 have 6 rows or more: 0.67.
    assert torch.equal(band_blocks(48, 15.0, 16), wide)
    # With 10 there are 10, of which 5: not more than 0.6.
    assert torch.equal(band_blocks(48, 10.0, 16), torch.eye(3, dtype=torch.bool))


@pytest.mark.parametrize("tokens", [3600, 1560, 880])
@pytest.mark.parametrize("block", [64, 128])
def test_any_resolution(tokens: int, block: int) -> None:
    """720p, 480p and 360p: blocks of each frame its own, the last one short."""
    frames, count = 21, -(-tokens // block)
    found = radial_blocks(frames, tokens, 0.2, block, sink=0)
    assert found.shape == (frames * count, frames * count)
    assert torch.equal(found, found.T)
    assert found.diagonal().all()
    assert radial_blocks(5, tokens, 1000.0, block, sink=0).all()
    sunk = radial_blocks(frames, tokens, 0.2, block, sink=2)
    assert sunk[:, : 2 * count].all()
    assert torch.equal(sunk[:, 2 * count :], found[:, 2 * count :])


def test_frames_at_the_same_distance_have_the_same_blocks() -> None:
    found = radial_blocks(9, 100, 0.3, 16).view(9, 7, 9, 7)
    for distance in range(9):
        for first in range(9 - distance):
            assert torch.equal(found[first, :, first + distance], found[0, :, distance])
    assert found[0, :, 0].all()
    assert found[0, :, 1].all()
