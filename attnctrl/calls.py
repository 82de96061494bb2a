"""Reading and changing the arguments and results of other people's functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch


class Signature:
    """Reads and replaces arguments of one function, which callers pass by position or by name."""

    def __init__(self, function: Callable) -> None:
        self.names = [n for n in inspect.signature(function).parameters if n != "self"]

    def get(self, args: tuple, kwargs: dict[str, Any], name: str) -> Any:
        """The argument's value; None where it is not given."""
        position = self.names.index(name)
        return args[position] if len(args) > position else kwargs.get(name)

    def put(self, args: tuple, kwargs: dict[str, Any], name: str, value: Any) -> tuple[tuple, dict[str, Any]]:
        """The arguments with another value of one of them."""
        position = self.names.index(name)
        if len(args) > position:
            return (*args[:position], value, *args[position + 1 :]), kwargs
        return args, {**kwargs, name: value}


def ordinary(tree: Any) -> Any:
    """The same nest of containers with inference-mode tensors replaced by copies that autograd may save."""
    if isinstance(tree, torch.Tensor):
        if not tree.is_inference():
            return tree
        with torch.inference_mode(False):
            return tree.clone()
    if isinstance(tree, dict):
        return {k: ordinary(v) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(ordinary(v) for v in tree)
    return tree


def rows_of(tree: Any, rows: int, kept: slice) -> Any:
    """The rows `kept` of every tensor in a nest of containers whose first axis is the batch of `rows`."""
    if isinstance(tree, torch.Tensor):
        return tree[kept] if tree.ndim > 0 and tree.shape[0] == rows else tree
    if isinstance(tree, dict):
        return {k: rows_of(v, rows, kept) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(rows_of(v, rows, kept) for v in tree)
    return tree


def previous(result: Any) -> torch.Tensor:
    """The latents in a scheduler's result, whichever of its two forms it has."""
    return result[0] if isinstance(result, tuple) else result.prev_sample


def with_previous(result: Any, latents: torch.Tensor) -> Any:
    if isinstance(result, tuple):
        return (latents, *result[1:])
    result.prev_sample = latents
    return result
