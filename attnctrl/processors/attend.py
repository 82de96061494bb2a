"""The one place where attention is computed under control, at the cheapest cost that the active controls allow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch

from attnctrl.errors import ControlError
from attnctrl.kernels import (
    LowRankBias,
    TokenGroups,
    attention_with_lse,
    combine_masks,
    logits,
    masked_attention,
    mean_columns,
    one_call_does,
    probabilities,
)
from attnctrl.processors.work import Work
from attnctrl.sampling import Active
from attnctrl.sites import Call, Stream

Mask = torch.Tensor | TokenGroups | None


def attend(call: Call, work: Work) -> torch.Tensor:
    """The attention of one call under the controls that act on its branch: (batch, heads, queries, head_dim).

    Nothing asked: the fused kernel. Masks: the fused kernel with a mask. Streams: one fused attention per
    context. Observed text maps: the fused kernel, plus scores of the few text keys. Scores or probabilities
    edited: the materialised form. A replacement: what it returns. Controls see the query and key of the layer; those
    that are multiplied, observed and handed to a replacement have the channels of low-rank biases as well.
    """
    active = work.active.get(call.branch, ())
    for one, timed in _having("inputs", active, call, work):
        with timed:
            call = one.control.inputs(call, one.state)
    mask, biased = _masked(call, active, work)
    observe = work.observe if call.branch == "cond" else None
    edited = any({"scores", "probs"} & one.points for one in active)
    more_keys = any(stream.offset is not None for stream in call.streams)

    probs, lse = _probabilities(call, biased, mask, active, work) if edited else (None, None)
    own = None
    if observe is not None:
        shown, own = _map(biased, mask, probs)
        observe(biased, shown, mask)

    result = None
    for one, timed in _having("attend", active, call, work):
        if result is None:
            with timed:
                result = one.control.attend(biased.change(seen=mask), one.state)
            if result is not None and edited:
                editor = next(a.control.name for a in active if {"scores", "probs"} & a.points)
                raise ControlError(
                    f"{one.control.name} and {editor} cannot work together at {call.site.name}: one replaces the "
                    "attention whose scores the other edits. Give them other sites (where) or steps (window)."
                )
    if result is not None and more_keys:
        raise ControlError(
            f"one control replaces the attention of {call.site.name}, to which another adds keys of references: give "
            "them other sites (where) or steps (window), or choose another placing of the references."
        )
    if result is None and edited and probs is not None:
        result = torch.matmul(probs.to(call.value.dtype), call.value)
    if result is None and more_keys:
        result, lse = attention_with_lse(biased.query, biased.key, biased.value, mask, biased.scale)
    if result is None:
        result = own
    if result is None:
        result = masked_attention(biased.query, biased.key, biased.value, mask, biased.scale)
    if call.streams:
        result = merge_streams(call, result, lse)
    for one, timed in _having("output", active, call, work):
        with timed:
            result = one.control.output(result, call, one.state)
    return result


def observe_only(call: Call, work: Work) -> None:
    """Hand the call's map to the observer, computing no output."""
    assert work.observe is not None
    shown, _ = _map(call, call.mask, None)
    work.observe(call, shown, call.mask)


def _map(call: Call, mask: Mask, probs: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What latent tokens see of text tokens, (batch, heads or 1 for their mean, latent tokens, text tokens), and the
    attention's output where it is a by-product, else None.

    No map for self-attention. In joint attention, unless the probabilities are there anyway, only the columns of the
    text are computed, from the log-sum-exp of the whole: no array is tokens x tokens.
    """
    if call.site.kind == "self":
        return None, None
    latent, text = call.queries.latent, call.keys.text
    if probs is None and call.site.kind == "cross":
        probs = probabilities(call.query, call.key, _dense(mask), call.scale)
    if probs is not None:
        return probs[:, :, latent, text], None
    output, lse = attention_with_lse(call.query, call.key, call.value, mask, call.scale)
    shown: torch.Tensor | None
    if isinstance(mask, TokenGroups):
        shown = mask.visible(text)[:, :, latent]
    else:
        shown = mask if mask is None or mask.shape[-2] == 1 else mask[..., latent, :]
        shown = None if shown is None else shown[..., text]
    columns = mean_columns(call.query[:, :, latent], call.key[:, :, text], lse[:, :, latent], call.scale, shown)
    return columns, output if one_call_does(call.query, call.key, call.value, mask) else None


def _having(
    point: str, active: tuple[Active, ...], call: Call, work: Work
) -> Iterator[tuple[Active, AbstractContextManager[None]]]:
    """The controls with this point, each with a timer that books it in the report."""
    for one in active:
        if point in one.points:
            yield one, work.report.timed(one.index, one.control.name, point, call.step.index, call.site.name)


def _masked(call: Call, active: tuple[Active, ...], work: Work) -> tuple[Mask, Call]:
    """What may be seen, and the call with the channels of low-rank biases."""
    masks = [] if call.mask is None else [call.mask]
    groups: TokenGroups | None = None
    biased = call
    for one, timed in _having("mask", active, call, work):
        with timed:
            mask = one.control.mask(call, one.state)
        if isinstance(mask, LowRankBias):
            query, key = mask.added(biased.query, biased.key, call.scale)
            biased, mask = biased.change(query=query, key=key), mask.groups
        if mask is None:
            continue
        if isinstance(mask, TokenGroups):
            groups = mask if groups is None else groups & mask
            continue
        if mask.ndim != 4:
            raise ControlError(
                f"{one.control.name}.mask returned a mask of shape {tuple(mask.shape)} at {call.site.name}: it must "
                "have the 4 axes (batch, heads, queries, keys), of size 1 where they do not matter."
            )
        masks.append(mask)
    dense = combine_masks(masks)
    return (dense if groups is None else _grouped(groups, dense, call)), biased


def _grouped(groups: TokenGroups, dense: torch.Tensor | None, call: Call) -> TokenGroups:
    """The groups without the keys that the model itself hides, such as text padding."""
    if dense is None:
        return groups
    if dense.shape[1:3] != (1, 1):
        raise ControlError(
            f"at {call.site.name} one control masks by token groups and another by a mask of shape "
            f"{tuple(dense.shape)}: they cannot work together."
        )
    try:
        return groups.padded(dense)
    except ValueError as error:
        raise ControlError(
            f"a control masks {call.site.name} by token groups, beside which padding can only be hidden. {error}"
        ) from None


def _dense(mask: Mask) -> torch.Tensor | None:
    return mask.dense() if isinstance(mask, TokenGroups) else mask


def _probabilities(
    call: Call, biased: Call, mask: Mask, active: tuple[Active, ...], work: Work
) -> tuple[torch.Tensor, torch.Tensor]:
    """The probabilities as the controls edit them, and the log-sum-exp of the edited scores."""
    scores = logits(biased.query, biased.key, _dense(mask), biased.scale)
    for one, timed in _having("scores", active, call, work):
        with timed:
            scores = one.control.scores(scores, call, one.state)
    # As in the kernels, a query that sees nothing gets nothing; 0 first, for a softmax of -inf has no gradient.
    blind = (scores == float("-inf")).all(dim=-1, keepdim=True) if isinstance(mask, TokenGroups) else None
    probs = (scores if blind is None else scores.masked_fill(blind, 0.0)).softmax(dim=-1)
    probs = probs if blind is None else probs.masked_fill(blind, 0.0)
    for one, timed in _having("probs", active, call, work):
        with timed:
            probs = one.control.probs(probs, call, one.state)
    return probs, scores.logsumexp(dim=-1)


def merge_streams(call: Call, result: torch.Tensor, lse: torch.Tensor | None) -> torch.Tensor:
    """The weighted sum of the layer's own attention and that of each further context.

    result: the layer's own, (batch, heads, queries, head_dim); lse: its log-sum-exp, (batch, heads, queries), for
    streams whose keys join its softmax: these come first, whatever the order.
    """
    merged, every = result, slice(None)
    for stream in (s for s in call.streams if s.offset is not None):
        assert lse is not None
        assert stream.offset is not None
        rows = stream.rows or every
        query, mask = _looking(call, stream)
        looked, more = attention_with_lse(query, stream.key, stream.value, mask, call.scale)
        offset = stream.offset[..., 0] if isinstance(stream.offset, torch.Tensor) else stream.offset
        more = more + offset
        total = torch.logaddexp(lse[rows], more)
        # A query that sees nothing at all keeps its output of 0.
        total = total.masked_fill(total == float("-inf"), 0.0)
        shares = (lse[rows] - total).exp()[..., None], (more - total).exp()[..., None]
        joined = (shares[0] * merged[rows] + shares[1] * looked).to(result.dtype)
        merged, lse = _with_rows(merged, rows, joined), _with_rows(lse, rows, total)
    merged = merged * call.base_weight
    for stream in (s for s in call.streams if s.offset is None):
        rows = stream.rows or every
        query, mask = _looking(call, stream)
        looked = masked_attention(query, stream.key, stream.value, mask, call.scale)
        merged = _with_rows(merged, rows, merged[rows] + stream.weight * looked)
    return merged.to(result.dtype)


def _looking(call: Call, stream: Stream) -> tuple[torch.Tensor, Mask]:
    """Who looks at a stream, and which of its keys they see."""
    query = call.query if stream.query is None else stream.query
    query = query if stream.rows is None or stream.query is not None else query[stream.rows]
    return query, _grouped(stream.mask, call.mask, call) if isinstance(stream.mask, TokenGroups) else stream.mask


def _with_rows(whole: torch.Tensor, rows: slice, part: torch.Tensor) -> torch.Tensor:
    """The tensor with some rows of its batch exchanged."""
    if rows == slice(None):
        return part
    changed = whole.to(torch.promote_types(whole.dtype, part.dtype), copy=True)
    changed[rows] = part
    return changed
