"""Chooses the form of an attention under sparse blocks, and says which one ran."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from attnctrl.kernels.blocks import SparseBlocks
from attnctrl.kernels.blocks_axis import SMALLEST_TILE
from attnctrl.kernels.blocks_reference import check
from attnctrl.kernels.dispatch import attention_with_lse, autocast, triton_runs

FORMS = {
    "reference": "blocks_reference",
    "triton": "blocks_autograd",
    "flex": "blocks_flex",
    "gather": "blocks_gather",
    "int8": "blocks_int8",
}
"""The modules of the forms, imported when they are asked for: not every machine has what they need."""
TILED = ("triton", "flex", "int8")
"""The forms that have a smallest block, SMALLEST_TILE."""
MASKED, FULL = "masked", "full"
"""Forms that skip nothing: attention with the mask as a boolean of queries x keys, and attention to every key."""

GATHER_COST = {128: 1.8, 64: 2.5, 32: 4.0, 16: 6.0}
"""What "gather" costs per visited pair, in units of PyTorch's fused attention on a CPU, by block size (of the smaller
side). Measured at 4096 tokens, head_dim 64, density 0.2, one thread; 32 lies between its neighbours."""
FEW_BLOCKS = 8
"""With fewer blocks of keys than this, nothing worth the work is skipped."""
FULL_ABOVE, FULL_BELOW = 0.7, 16384
"""On a GPU, full attention is taken for no slower above this density, or below so many keys; as others report, not
measured here."""


class Attended(NamedTuple):
    """output: like the query. lse: natural log-sum-exp, float32 (batch, heads, queries), or None. form: what ran."""

    output: torch.Tensor
    lse: torch.Tensor | None
    form: str


def block_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: SparseBlocks,
    scale: float,
    with_lse: bool = False,
    allow_full: bool = False,
    form: str | None = None,
) -> Attended:
    """Attention in which a block of queries visits some blocks of keys.

    query: (batch, heads, queries, head_dim); key, value: (batch, heads, keys, head_dim), of any strides. scale: of
    the products, usually head_dim ** -0.5. The results are differentiable, once. A query that sees nothing has output
    0 and log-sum-exp -inf.

    form: one of FORMS, "masked" or "full" to force it. None: "triton" where it runs; elsewhere "gather", or "masked"
    where skipping costs more than it saves (dense blocks, or few). All of these give what the mask says; "int8", which
    rounds query and key and has no gradients, and "full" are never chosen unless asked for.
    allow_full: whether "full", which attends to every key that is not hidden, may run where it is no slower. For
    masks that stand in for full attention; the result is then closer to it than the mask's. On a GPU that a mask is
    dense is known only if it says so (`SparseBlocks.share`, or `density` was called): nothing waits here.

    Raises:
        ValueError: arguments that do not fit together, or a form that cannot run here; the sentence says which.
    """
    query, key, value = autocast(query, key, value)
    check(query, key, value, mask, scale)
    form = form or choose(query, mask, allow_full)
    if form in TILED and _smaller_side(mask) < SMALLEST_TILE:
        raise ValueError(
            f'The form "{form}" takes blocks of {SMALLEST_TILE} tokens or more, these have {_smaller_side(mask)}: use '
            '"masked" or "gather".'
        )
    attend: Any = {FULL: _full, MASKED: _masked}.get(form) or _module(form).block_attention
    with torch.autocast(query.device.type, enabled=False):  # each form knows in what precision it computes
        output, lse = attend(query, key, value, mask, scale, with_lse)
    return Attended(output, lse if with_lse else None, form)


def _module(form: str) -> Any:
    if form not in FORMS:
        raise ValueError(f'There is no form "{form}": choose one of {", ".join([*FORMS, MASKED, FULL])}.')
    if form == "triton" and find_spec("triton") is None:
        raise ValueError("Triton is not installed: use another form, or none, which is plain PyTorch here.")
    return import_module(f"attnctrl.kernels.{FORMS[form]}")


def choose(query: torch.Tensor, mask: SparseBlocks, allow_full: bool) -> str:
    """The form for a query under a mask: "triton", "gather", "masked" or "full"."""
    pays = not why_full(query, mask)
    # One head_dim for all three.
    if triton_runs(query, query) and _smaller_side(mask) >= SMALLEST_TILE:
        return "triton" if pays or not allow_full else FULL
    return "gather" if pays else FULL if allow_full else MASKED


def why_full(query: torch.Tensor, mask: SparseBlocks) -> str:
    """Why skipping what the mask skips saves no time on this device; empty where it does."""
    density, size = mask.known_density(), _smaller_side(mask)
    if size < SMALLEST_TILE:
        return f"blocks of fewer than {SMALLEST_TILE} tokens"
    if triton_runs(query, query):
        if mask.keys < FULL_BELOW:
            return f"fewer than {FULL_BELOW} keys"
        return f"a density above {FULL_ABOVE:g}" if density is not None and density > FULL_ABOVE else ""
    if mask.key_axis.blocks < FEW_BLOCKS:
        return f"fewer than {FEW_BLOCKS} blocks of keys"
    limit = 1 / GATHER_COST[size]
    return f"a density of {limit:.2f} or more in blocks of {size}" if density is not None and density >= limit else ""


def _smaller_side(mask: SparseBlocks) -> int:
    return min(mask.query_axis.size, mask.key_axis.size)


def _full(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: SparseBlocks, scale: float, with_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    seen = None if mask.hidden is None else ~mask.hidden[:, None, None, :]
    if with_lse:
        return attention_with_lse(query, key, value, seen, scale)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale), None


def _masked(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: SparseBlocks, scale: float, with_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    allowed = mask.dense()
    if with_lse:
        return attention_with_lse(query, key, value, allowed, scale)
    # A row that sees nothing would be 0 / 0 in some versions, and its gradient NaN: it sees all, and its result is 0.
    blind = ~allowed.any(dim=-1, keepdim=True)
    found = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed | blind, scale=scale)
    return found.masked_fill(blind, 0.0), None
