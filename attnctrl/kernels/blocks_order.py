"""Reorders tokens, so that those that attend alike lie in one block."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, eq=False)
class TokenOrder:
    """A permutation of tokens, one for all heads or one per head; attention does not depend on it.

    order: int64 (heads or 1, tokens): place i takes token order[h, i]. inverse: the way back, made by `of`.

    On a CPU it is PyTorch's indexing. On a GPU it is a kernel of its own: PyTorch's index_select moves element by
    element, two bytes at a time in half precision, and takes one order for all heads; its gather would read an index of
    eight bytes for each such element.
    """

    order: torch.Tensor
    inverse: torch.Tensor

    @classmethod
    def of(cls, order: torch.Tensor) -> TokenOrder:
        """From int64 (heads or 1, tokens) or (tokens,), in which each row holds every token once: this is not checked.

        Raises:
            ValueError: another type or number of axes.
        """
        if order.dtype != torch.int64 or order.dim() not in (1, 2):
            raise ValueError(
                f"order is {order.dtype} of shape {tuple(order.shape)}: it must be int64 (heads or 1, tokens)."
            )
        order = order.view(-1, order.shape[-1])
        tokens = torch.arange(order.shape[1], device=order.device).expand(order.shape)
        return cls(order, torch.empty_like(order).scatter_(1, order, tokens))

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """(batch, heads, tokens, channels) in this order; differentiable.

        Raises:
            ValueError: the tensor has other tokens, heads or another device.
        """
        return self._move(tensor, self.order, self.inverse)

    def restore(self, tensor: torch.Tensor) -> torch.Tensor:
        """The inverse of `apply`, with its errors."""
        return self._move(tensor, self.inverse, self.order)

    def _move(self, tensor: torch.Tensor, order: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        heads, tokens = order.shape
        if tensor.dim() != 4 or tensor.shape[2] != tokens or heads not in (1, tensor.shape[1]):
            raise ValueError(
                f"The order is for {tokens} tokens of {heads} heads (1 fits any), the tensor, (batch, heads, tokens, "
                f"channels), has shape {tuple(tensor.shape)}."
            )
        if tensor.device != order.device:
            raise ValueError(f"The order is on {order.device}, the tensor on {tensor.device}.")
        moved: torch.Tensor = _Moved.apply(tensor, order, back)
        return moved


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, order: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        ctx.back = back  # not saved as a tensor: one made under inference mode could not be
        return move(tensor, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return move(grad, ctx.back), None, None


def move(tensor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """tensor[b, h, order[h, i]] at (b, h, i), by the fastest means that this machine has."""
    if tensor.device.type == "cuda" and find_spec("triton") is not None:
        from attnctrl.kernels.blocks_order_triton import move as by_kernel

        return by_kernel(tensor, order)
    if order.shape[0] == 1:
        return tensor.index_select(2, order[0])
    return tensor.take_along_dim(order[None, :, :, None], dim=2)
