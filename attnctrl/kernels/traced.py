"""Attention under token groups as one operator, which torch.compile leaves whole: in a graph a number names the mask.

Masks are Python objects with what was derived from them, and change from step to step. A graph that held one would be
traced anew for each; the number is a tensor, so one graph serves them all.
"""

from __future__ import annotations

from itertools import count
from typing import Optional
from weakref import WeakValueDictionary

import torch

from attnctrl.kernels.dispatch import group_attention
from attnctrl.kernels.groups import TokenGroups

_NAMED: WeakValueDictionary[int, TokenGroups] = WeakValueDictionary()
_NUMBERS = count()


def number_of(groups: TokenGroups) -> torch.Tensor:
    """What names the mask in a graph, int64 () on the CPU, for as long as somebody keeps the mask."""
    if "number" not in groups.memo:
        number = next(_NUMBERS)
        _NAMED[number] = groups
        groups.memo["number"] = torch.tensor(number)
    found: torch.Tensor = groups.memo["number"]
    return found


# torch reads the annotations, and knows Optional in all versions that we support.
def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    number: torch.Tensor,
    padding: Optional[torch.Tensor],  # noqa: UP045
    scale: float,
) -> torch.Tensor:
    groups = _NAMED[int(number)]
    if padding is not None:
        groups = groups.padded(padding)
    # As the form below says it: the forms differ in their strides.
    return group_attention(query, key, value, groups, scale).contiguous()


numbered_group_attention = torch.library.custom_op("attnctrl::group_attention", _attention, mutates_args=())
"""`group_attention` under the mask of that number, without the keys that `padding` hides (`TokenGroups.padded`).

Arguments: query, key, value, number, padding or None, scale. Returns the output alone, contiguous; no gradient.
"""


@numbered_group_attention.register_fake
def _form(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    number: torch.Tensor,
    padding: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3])
