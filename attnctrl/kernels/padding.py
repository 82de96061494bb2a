"""A model's own padding mask as hidden keys, worked out once per mask that it is laid over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

HIDDEN = -1000.0
"""Additive masks hide what they set this low: models write -inf, -10000 or their element type's least number."""

Mask = TypeVar("Mask")


def padded(memo: dict[Any, Any], padding: torch.Tensor, hide: Callable[[torch.Tensor], Mask]) -> Mask:
    """What `hide` makes of the hidden keys, bool (batch or 1, keys), of a padding mask; kept in `memo`.

    padding: (batch or 1, 1, 1, keys), bool (True = visible) or additive, hiding at HIDDEN or below. A model hands
    the same tensor to every layer of a step, so the last result serves for as long as the padding is the same
    memory, not written to since. The last padding is kept with it, lest its memory be used again.

    Raises:
        ValueError: an additive padding that does more than hide. To see that, a new one is read, and waited for.
    """
    kept: _Kept | None = memo.get("padded")
    if kept is None or not kept.fits(padding):
        if padding.dtype == torch.bool:
            hidden = ~padding
        else:
            hidden = padding <= HIDDEN
            if bool((padding.masked_fill(hidden, 0) != 0).any()):
                raise ValueError(f"The padding mask adds other numbers than 0 and {HIDDEN:g} or less to the scores.")
        kept = _Kept(padding, _version(padding), hide(hidden[:, 0, 0]))
        memo["padded"] = kept
    found: Mask = kept.result
    return found


@dataclass(frozen=True)
class _Kept:
    """A padding mask, how often it had been written to, and what was made for it."""

    padding: torch.Tensor
    version: int | None
    result: Any

    def fits(self, padding: torch.Tensor) -> bool:
        """Whether `padding` is the same memory in the same form, not written to since."""
        return self.version is not None and self.version == _version(padding) and _form(self.padding) == _form(padding)


def _version(tensor: torch.Tensor) -> int | None:
    """How often a tensor's memory was written to; None for inference tensors, which do not count."""
    return None if tensor.is_inference() else tensor._version


def _form(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
