"""Regions on a grid: by hand and by property."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import attnctrl as ac


def region(**shape: Any) -> ac.Region:
    return ac.Region("cat", **shape)


# by hand -----------------------------------------------------------------------------------------------------------
def test_coverage_of_a_box_on_a_coarse_grid() -> None:
    """Half of the first cell, all of the second, a quarter of the third, in each direction of a 1 x 4 grid."""
    grid = region(box=(0.125, 0.0, 0.5625, 1.0)).raster(1, 4)
    assert grid.tolist() == [[0.5, 1.0, 0.25, 0.0]]
    grid = region(box=(0.0, 0.125, 1.0, 0.5625)).raster(4, 1)
    assert grid.flatten().tolist() == [0.5, 1.0, 0.25, 0.0]


def test_nearest_takes_cells_whose_centre_is_inside() -> None:
    grid = region(box=(0.125, 0.0, 0.625, 1.0)).raster(1, 4, "nearest")
    assert grid.tolist() == [[1, 1, 0, 0]]  # centres .125 (the left border counts) and .375; .625 is the right border


def test_any_takes_every_touched_cell() -> None:
    grid = region(box=(0.125, 0.0, 0.625, 1.0)).raster(1, 4, "any")
    assert grid.tolist() == [[1, 1, 1, 0]]


def test_two_boxes_side_by_side_share_no_cell_and_leave_none() -> None:
    left, right = region(box=(0, 0, 0.43, 1)), region(box=(0.43, 0, 1, 1))
    for how in ("nearest", "coverage"):
        for width in (3, 8, 15):
            assert torch.allclose(left.raster(4, width, how) + right.raster(4, width, how), torch.ones(4, width))


def test_a_mask_is_averaged_over_cells_of_any_grid() -> None:
    bitmap = np.zeros((4, 6))
    bitmap[:2, :3] = 1
    grid = region(mask=bitmap).raster(2, 4)  # 1.5 columns of the bitmap to a cell
    torch.testing.assert_close(grid, torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(region(mask=bitmap).raster(1, 2), torch.tensor([[0.5, 0.0]]))
    finer = region(mask=bitmap).raster(8, 12)
    assert finer[:4, :6].eq(1).all()
    assert finer.sum() == 24


# by property -------------------------------------------------------------------------------------------------------
@st.composite
def boxes(draw: Any) -> tuple[float, float, float, float]:
    ends = st.floats(0, 1, width=32)
    x0, x1 = sorted((draw(ends), draw(ends)))
    y0, y1 = sorted((draw(ends), draw(ends)))
    # Slivers thinner than this are nothing anyone draws, and float32 products of theirs vanish.
    if x1 - x0 < 1e-3 or y1 - y0 < 1e-3:
        x0, y0, x1, y1 = 0.0, 0.0, max(x1, 0.01), max(y1, 0.01)
    return x0, y0, x1, y1


SIDES = st.integers(1, 33)


@given(boxes(), SIDES, SIDES)
def test_coverage_sums_to_the_area_of_the_box(box: Any, height: int, width: int) -> None:
    grid = region(box=box).raster(height, width)
    assert grid.shape == (height, width)
    assert grid.dtype == torch.float32
    assert grid.min() >= 0
    assert grid.max() <= 1
    area = (box[2] - box[0]) * (box[3] - box[1])
    assert float(grid.double().sum()) == pytest.approx(area * height * width, rel=1e-4, abs=1e-5)


@given(boxes(), SIDES, SIDES)
def test_any_holds_nearest_and_coverage_and_more_than_half_of_a_side_is_nearest(
    box: Any, height: int, width: int
) -> None:
    one = region(box=box)
    coverage, touched = one.raster(height, width), one.raster(height, width, "any")
    assert torch.equal(touched, (coverage > 0).float())
    centres = (np.arange(height)[:, None] + 0.5) / height, (np.arange(width)[None] + 0.5) / width
    inside = (centres[0] >= box[1]) & (centres[0] < box[3]) & (centres[1] >= box[0]) & (centres[1] < box[2])
    if not inside.any():
        with pytest.raises(ac.ControlError, match=rf"empty after rasterising to {height}x{width}"):
            one.raster(height, width, "nearest")
        return
    nearest = one.raster(height, width, "nearest")
    assert torch.equal(nearest, torch.from_numpy(inside).float())
    assert (touched >= nearest).all()
    assert (nearest[coverage > 0.999] == 1).all()  # a cell covered as a whole has its centre inside


@given(boxes(), SIDES, SIDES)
def test_a_rectangle_is_the_same_as_polygon_and_nearly_the_same_as_mask(box: Any, height: int, width: int) -> None:
    x0, y0, x1, y1 = box
    polygon = region(polygon=[(x0, y0), (x1, y0), (x1, y1), (x0, y1)]).raster(height, width)
    # The polygon is drawn on 512 x 512 pixels, its outline included: each border is off by two of them at most.
    slack = 2 * 2 / 512
    difference = (polygon - region(box=box).raster(height, width)).abs()
    rows, columns = difference.amax(dim=1), difference.amax(dim=0)
    assert rows.max() <= slack * max(height, width) + 1e-6
    assert columns.max() <= slack * max(height, width) + 1e-6


@given(boxes(), st.sampled_from([8, 16, 32]), st.sampled_from([8, 16, 32]))
def test_halving_a_grid_averages_coverage(box: Any, height: int, width: int) -> None:
    """Coverage on a coarse grid is the mean of that on a grid twice as fine: grids of one model agree."""
    fine = region(box=box).raster(2 * height, 2 * width)
    pooled = torch.nn.functional.avg_pool2d(fine[None, None], 2)[0, 0]
    torch.testing.assert_close(region(box=box).raster(height, width), pooled, atol=1e-5, rtol=1e-4)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**16), SIDES, SIDES)
def test_the_mean_of_a_mask_is_kept_on_any_grid(rows: int, columns: int, seed: int, height: int, width: int) -> None:
    bitmap = np.random.default_rng(seed).random((rows + 1, columns + 1)) > 0.5
    bitmap[0, 0] = True
    grid = region(mask=bitmap).raster(height, width)
    assert float(grid.mean()) == pytest.approx(bitmap.mean(), abs=1e-5)
    assert grid.min() >= 0
    assert grid.max() <= 1
