"""Sparse blocks: the structured mask of block-sparse attention, for long sequences of images and videos."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from attnctrl.kernels.blocks_axis import BlockAxis


@dataclass(frozen=True, eq=False)
class SparseBlocks:
    """Which blocks of keys each block of queries visits, and what is hidden inside them.

    visited: bool (batch or 1, heads or 1, query blocks, key blocks). query_axis, key_axis: how tokens make blocks.
    hidden: bool (batch or 1, keys), keys that nobody sees, such as text padding; None: none.
    pattern: int32, the shape of visited: which of `patterns` holds inside a block. patterns: bool (patterns, query
    block size, key block size), true where a query sees a key; the first is all true. Both or none; that each number
    has its pattern is not checked, which would wait.
    share: the share of pairs in visited blocks where whoever made the mask knows it, as a top-k selection does; a
    dispatcher can then use it without waiting for a GPU.

    A query that sees nothing has output 0 and log-sum-exp -inf, in every form of the attention. Making one waits for
    nothing. Its tensors must not be written to later: lists are derived from them once and kept with the mask.

    Raises:
        ValueError: tensors whose type, shape or device does not fit.
    """

    visited: torch.Tensor
    query_axis: BlockAxis
    key_axis: BlockAxis
    hidden: torch.Tensor | None = None
    pattern: torch.Tensor | None = None
    patterns: torch.Tensor | None = None
    share: float | None = None
    memo: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)
    """What the kernels derived from the mask, by a key of their own."""

    def __post_init__(self) -> None:
        shape = (self.query_axis.blocks, self.key_axis.blocks)
        if self.visited.dtype != torch.bool or self.visited.dim() != 4 or self.visited.shape[2:] != shape:
            raise ValueError(
                f"visited is {self.visited.dtype} of shape {tuple(self.visited.shape)}: it must be bool (batch or 1, "
                f"heads or 1, {shape[0]} query blocks, {shape[1]} key blocks)."
            )
        if self.hidden is not None:
            self._check_hidden(self.hidden)
        if (self.pattern is None) != (self.patterns is None):
            raise ValueError("pattern and patterns go together: give both or none.")
        if self.pattern is not None and self.patterns is not None:
            tile = (self.query_axis.size, self.key_axis.size)
            if self.pattern.dtype != torch.int32 or self.pattern.shape != self.visited.shape:
                raise ValueError(
                    f"pattern is {self.pattern.dtype} of shape {tuple(self.pattern.shape)}: it must be int32, of the "
                    f"shape of visited, {tuple(self.visited.shape)}."
                )
            if self.patterns.dtype != torch.bool or self.patterns.dim() != 3 or self.patterns.shape[1:] != tile:
                raise ValueError(
                    f"patterns is {self.patterns.dtype} of shape {tuple(self.patterns.shape)}: it must be bool "
                    f"(patterns, {tile[0]}, {tile[1]})."
                )
        for name in ("hidden", "pattern", "patterns"):
            other = getattr(self, name)
            if other is not None and other.device != self.device:
                raise ValueError(f"visited is on {self.device}, {name} on {other.device}.")
        if self.share is not None and not 0 <= self.share <= 1:
            raise ValueError(f"share is {self.share}: it must be from 0 to 1.")

    def _check_hidden(self, hidden: torch.Tensor) -> None:
        if hidden.dtype != torch.bool or hidden.dim() != 2 or hidden.shape[1] != self.keys:
            raise ValueError(
                f"hidden is {hidden.dtype} of shape {tuple(hidden.shape)}: it must be bool (batch or 1, {self.keys})."
            )
        batches = {hidden.shape[0], self.visited.shape[0]} - {1}
        if len(batches) > 1:
            raise ValueError(f"visited and hidden are for batches of {sorted(batches)}: give one size, or 1.")

    @classmethod
    def everything(cls, query_axis: BlockAxis, key_axis: BlockAxis, device: torch.device | str = "cpu") -> SparseBlocks:
        """The mask that hides nothing."""
        visited = torch.ones(1, 1, query_axis.blocks, key_axis.blocks, dtype=torch.bool, device=device)
        return cls(visited, query_axis, key_axis, share=1.0)

    @property
    def batch(self) -> int:
        """The batch that the mask is for; 1 fits any."""
        return max(self.visited.shape[0], 1 if self.hidden is None else self.hidden.shape[0])

    @property
    def heads(self) -> int:
        """The heads that the mask is for; 1 fits any."""
        return self.visited.shape[1]

    @property
    def queries(self) -> int:
        return self.query_axis.tokens

    @property
    def keys(self) -> int:
        return self.key_axis.tokens

    @property
    def device(self) -> torch.device:
        return self.visited.device

    def to(self, device: torch.device | str) -> SparseBlocks:
        """The same mask on another device; itself where it is there already."""
        if torch.device(device) == self.device:
            return self
        tensors = (self.hidden, self.pattern, self.patterns)
        hidden, pattern, patterns = (None if one is None else one.to(device) for one in tensors)
        return replace(self, visited=self.visited.to(device), hidden=hidden, pattern=pattern, patterns=patterns)

    def hide_keys(self, hidden: torch.Tensor) -> SparseBlocks:
        """The mask without the keys where `hidden`, bool (batch or 1, keys), is true: for text padding."""
        self._check_hidden(hidden)
        hidden = hidden.to(self.device)
        return replace(self, hidden=hidden if self.hidden is None else self.hidden | hidden)

    def dense(self) -> torch.Tensor:
        """The mask as bool (batch or 1, heads or 1, queries, keys), for the reference path."""
        (row, in_row), (column, in_column) = (
            axis.block_of_token(self.device) for axis in (self.query_axis, self.key_axis)
        )
        allowed = self.visited[:, :, row[:, None], column[None, :]]
        if self.pattern is not None and self.patterns is not None:
            number = self.pattern[:, :, row[:, None], column[None, :]].long()
            allowed = allowed & self.patterns[number, in_row[:, None], in_column[None, :]]
        return allowed if self.hidden is None else allowed & ~self.hidden[:, None, None, :]

    def density(self) -> float:
        """The share of (query, key) pairs that lie in visited blocks: what is computed, whatever is hidden inside.

        The share that was given, else counted once; on a GPU the count waits for it.
        """
        if self.share is not None:
            return self.share
        if "density" not in self.memo:
            self.memo["density"] = float(self.counted())
        found: float = self.memo["density"]
        return found

    def counted(self) -> torch.Tensor:
        """What `density` counts, a tensor of one number on the mask's device: for who must not wait."""
        rows, columns = (axis.bounds(self.device)[1].double() for axis in (self.query_axis, self.key_axis))
        visited = self.visited.flatten(0, 1).double()
        return ((visited @ columns).mean(dim=0) @ rows) / (self.queries * self.keys)

    def known_density(self) -> float | None:
        """`density` where it can be told without waiting for a GPU, else None."""
        if self.share is None and "density" not in self.memo and self.device.type != "cpu":
            return None
        return self.density()
