"""Binary image operations for the detector, in numpy alone: erosion, dilation, connected components."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


def dilate(mask: Mask, radius: int = 1) -> Mask:
    """Mask grown by a square of side 2 radius + 1."""
    for axis in (0, 1):
        grown = mask.copy()
        for shift in range(1, radius + 1):
            ahead = [slice(None), slice(None)]
            behind = [slice(None), slice(None)]
            ahead[axis], behind[axis] = slice(shift, None), slice(None, -shift)
            grown[tuple(ahead)] |= mask[tuple(behind)]
            grown[tuple(behind)] |= mask[tuple(ahead)]
        mask = grown
    return mask


def erode(mask: Mask, radius: int = 1) -> Mask:
    """Mask shrunk by a square of side 2 radius + 1; what lies outside the image counts as set."""
    return ~dilate(~mask, radius)


def components(mask: Mask) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Eight-connected components of a mask (h, w), largest first, each as (rows, columns) of its pixels.

    Works on the runs of set pixels of each row, joined by union-find: a 128x128 image has a few hundred at most.
    """
    height, width = mask.shape
    padded = np.zeros((height, width + 2), dtype=np.int8)
    padded[:, 1:-1] = mask
    change = np.diff(padded, axis=1)
    rows, starts = np.nonzero(change == 1)
    _, ends = np.nonzero(change == -1)
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    row, start, end = rows.tolist(), starts.tolist(), ends.tolist()
    above = 0
    for i in range(len(row)):
        while above < i and (row[above] < row[i] - 1 or (row[above] == row[i] - 1 and end[above] < start[i])):
            above += 1
        j = above
        while j < i and row[j] == row[i] - 1 and start[j] <= end[i]:
            parent[root(i)] = root(j)
            j += 1
    groups: dict[int, list[int]] = {}
    for i in range(len(row)):
        groups.setdefault(root(i), []).append(i)
    out = []
    for runs in groups.values():
        y = np.concatenate([np.full(end[i] - start[i], row[i]) for i in runs])
        x = np.concatenate([np.arange(start[i], end[i]) for i in runs])
        out.append((y, x))
    return sorted(out, key=lambda pixels: -len(pixels[0]))
