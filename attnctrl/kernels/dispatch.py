"""Chooses the form of an attention: Triton where there is a CUDA device, plain PyTorch elsewhere.

Every form has the signature of `groups_reference.group_attention`, the definition; none but it, and FlexAttention off
the GPU, allocates queries x keys.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, overload

import torch

from attnctrl.kernels import chunked, groups_merge
from attnctrl.kernels.groups import TokenGroups
from attnctrl.kernels.groups_reference import check
from attnctrl.kernels.reference import attention

FORMS = {
    "reference": "groups_reference",
    "triton": "groups_autograd",
    "flex": "groups_flex",
    "merge": "groups_merge",
    "xformers": "groups_xformers",
}
"""The modules of the forms, imported when they are asked for: not every machine has what they need."""


FEW_KINDS = 16
"""Up to so many, one fused attention per kind of query is taken for the faster on a CPU (twice as fast with seven)."""


@overload
def group_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    groups: TokenGroups,
    scale: float,
    return_lse: Literal[False] = ...,
    form: str | None = ...,
) -> torch.Tensor: ...
@overload
def group_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    groups: TokenGroups,
    scale: float,
    return_lse: Literal[True],
    form: str | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def group_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    groups: TokenGroups,
    scale: float,
    return_lse: bool = False,
    form: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention in which a query sees the keys that it shares a group with.

    query: (batch, heads, queries, head_dim); key, value: (batch, heads, keys, head_dim), of any strides; value may have
    another head_dim than the other two (`LowRankBias` adds channels to them). scale: of the products, usually
    head_dim ** -0.5. Returns the output, (batch, heads, queries, head_dim of value); with `return_lse` also the
    natural logarithm of each softmax's sum, float32 (batch, heads, queries). Both are differentiable, once. A query
    that sees nothing has output 0 and lse -inf.

    form: one of FORMS to force it; None: "triton" for fp16, bf16 and float32 with head_dim up to 256 on a CUDA device;
    on a CPU "merge" where only the output is wanted and at most FEW_KINDS kinds of queries need a call each; else
    PyTorch by chunks of queries.

    Raises:
        ValueError: arguments that do not fit together, or a form that cannot run here; the sentence says which.
    """
    query, key, value = _autocast(query, key, value)
    if form is None:
        return _automatic(query, key, value, groups, scale, return_lse)
    if form not in FORMS:
        raise ValueError(f'There is no form "{form}": choose one of {", ".join(FORMS)}.')
    if form == "triton" and find_spec("triton") is None:
        raise ValueError("Triton is not installed: use another form, or none, which is plain PyTorch here.")
    module: Any = import_module(f"attnctrl.kernels.{FORMS[form]}")
    output, lse = module.group_attention(query, key, value, groups, scale, return_lse)
    return (output, lse) if return_lse else output


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: TokenGroups | torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Attention under a mask of either kind: `group_attention`, or the fused attention of `reference`."""
    if isinstance(mask, TokenGroups):
        return group_attention(query, key, value, mask, scale)
    return attention(query, key, value, mask, scale)


def attention_with_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: TokenGroups | torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with the log-sum-exp that `columns.column_probabilities` needs; neither allocates queries x keys.

    mask: token groups; or None; or a tensor, bool or additive and broadcastable to (batch, heads, queries, keys),
    which gets no gradient. Shapes, results and errors are those of `group_attention`. A mask that is a tensor is taken
    by chunks of queries on every device, which is slow on a GPU, but for one that hides keys from all queries alike.
    """
    query, key, value = _autocast(query, key, value)
    if isinstance(mask, torch.Tensor):
        groups = _from_hidden_keys(mask, query.shape[2])
        if groups is None:
            return chunked.attention(query, key, value, mask, scale)
        mask = groups
    if mask is None:
        if not triton_runs(query, value):
            return chunked.attention(query, key, value, None, scale)
        mask = _everything(query.shape[2], key.shape[2], query.device)
    return _automatic(query, key, value, mask, scale, True)  # type: ignore[return-value]


def one_call_does(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: TokenGroups | torch.Tensor | None
) -> bool:
    """Whether the output of `attention_with_lse` is what the attention without the log-sum-exp would give.

    It is where one kernel makes both. Where gradients are taken it may differ in rounding, and nobody compares bits.
    """
    alone = isinstance(mask, TokenGroups) and not _merges(query, key, value, mask)
    return alone or _wants_gradient(query, key, value)


def triton_runs(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the Triton form would be chosen for these queries and values."""
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    return (
        query.device.type == "cuda"
        and torch.version.hip is None
        and query.dtype in dtypes
        and max(query.shape[-1], value.shape[-1]) <= 256
        and find_spec("triton") is not None
    )


def _automatic(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, groups: TokenGroups, scale: float, return_lse: bool
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    check(query, key, value, groups, scale)
    if triton_runs(query, value):
        from attnctrl.kernels import groups_autograd

        output, lse = groups_autograd.group_attention(query, key, value, groups, scale)
    elif not return_lse and _merges(query, key, value, groups):
        return groups_merge.group_attention(query, key, value, groups, scale)[0]
    else:
        output, lse = chunked.attention(query, key, value, groups, scale)
    return (output, lse) if return_lse else output


def _merges(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, groups: TokenGroups) -> bool:
    """Whether the output alone is made by the form "merge"."""
    # Not for gradients: they would keep each kind's copy of the keys that it sees.
    return query.device.type == "cpu" and not _wants_gradient(query, key, value) and _few(groups)


def _wants_gradient(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _few(groups: TokenGroups) -> bool:
    """Whether there are at most FEW_KINDS kinds of queries; it reads the bits, so not on a GPU."""
    if "few" not in groups.memo:
        groups.memo["few"] = len(groups.query_bits.unique()) <= FEW_KINDS
    return bool(groups.memo["few"])


def _from_hidden_keys(mask: torch.Tensor, queries: int) -> TokenGroups | None:
    """The groups of a bool mask that is the same for all heads and queries, as of text padding; else None."""
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1:3] != (1, 1):
        return None
    return _everything(queries, mask.shape[3], mask.device).padded(mask)


@lru_cache(maxsize=16)
def _everything(queries: int, keys: int, device: torch.device) -> TokenGroups:
    """Kept, so that its tile lists are made once per shape and not once per layer."""
    return TokenGroups.everything(queries, keys, device)


def _autocast(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """What PyTorch's own attention does under autocast: there a normalised query may be wider than its value."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]
