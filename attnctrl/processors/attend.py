"""The one place where attention is computed under control, at the cheapest cost that the active controls allow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch

from attnctrl.errors import ControlError
from attnctrl.kernels import attention, combine_masks, logits
from attnctrl.processors.work import Work
from attnctrl.sampling import Active
from attnctrl.sites import Call


def attend(call: Call, work: Work) -> torch.Tensor:
    """The attention of one call under the controls that act on its branch: (batch, heads, queries, head_dim).

    Nothing asked: the fused kernel. Masks: the fused kernel with a mask. Streams: one fused attention per
    context. Observed text maps: the fused kernel, plus scores of the few text keys. Scores or probabilities
    edited: the materialised form. A replacement: what it returns.
    """
    active = work.active.get(call.branch, ())
    for one, timed in _having("inputs", active, call, work):
        with timed:
            call = one.control.inputs(call, one.state)
    mask = _mask(call, active, work)
    observe = work.observe if call.branch == "cond" else None
    edited = any({"scores", "probs"} & one.points for one in active)

    probs = None
    if edited or (observe is not None and call.site.kind != "self"):
        probs = _probabilities(call, mask, active, work)
    if observe is not None:
        observe(call, _map(call, probs), mask)

    result = None
    for one, timed in _having("attend", active, call, work):
        if result is None:
            with timed:
                result = one.control.attend(call, one.state)
    if result is None and edited and probs is not None:
        result = torch.matmul(probs.to(call.value.dtype), call.value)
    if result is None:
        result = attention(call.query, call.key, call.value, mask, call.scale)
    if call.streams:
        result = _merge_streams(call, result)
    for one, timed in _having("output", active, call, work):
        with timed:
            result = one.control.output(result, call, one.state)
    return result


def observe_only(call: Call, work: Work) -> None:
    """Hand the call's probabilities to the observer, computing no output."""
    assert work.observe is not None
    probs = None if call.site.kind == "self" else _probabilities(call, call.mask, (), work)
    work.observe(call, _map(call, probs), call.mask)


def _map(call: Call, probs: torch.Tensor | None) -> torch.Tensor | None:
    """What latent tokens see of text tokens: (batch, heads, latent tokens, text tokens)."""
    return None if probs is None else probs[:, :, call.queries.latent, call.keys.text]


def _having(
    point: str, active: tuple[Active, ...], call: Call, work: Work
) -> Iterator[tuple[Active, AbstractContextManager[None]]]:
    """The controls with this point, each with a timer that books it in the report."""
    for one in active:
        if point in one.points:
            yield one, work.report.timed(one.index, one.control.name, point, call.step.index, call.site.name)


def _mask(call: Call, active: tuple[Active, ...], work: Work) -> torch.Tensor | None:
    masks = [] if call.mask is None else [call.mask]
    for one, timed in _having("mask", active, call, work):
        with timed:
            mask = one.control.mask(call, one.state)
        if mask is None:
            continue
        if mask.ndim != 4:
            raise ControlError(
                f"{one.control.name}.mask returned a mask of shape {tuple(mask.shape)} at {call.site.name}: it must "
                "have the 4 axes (batch, heads, queries, keys), of size 1 where they do not matter."
            )
        masks.append(mask)
    return combine_masks(masks)


def _probabilities(call: Call, mask: torch.Tensor | None, active: tuple[Active, ...], work: Work) -> torch.Tensor:
    scores = logits(call.query, call.key, mask, call.scale)
    for one, timed in _having("scores", active, call, work):
        with timed:
            scores = one.control.scores(scores, call, one.state)
    probs = scores.softmax(dim=-1)
    for one, timed in _having("probs", active, call, work):
        with timed:
            probs = one.control.probs(probs, call, one.state)
    return probs


def _merge_streams(call: Call, result: torch.Tensor) -> torch.Tensor:
    """The weighted sum of the layer's own attention and that of each further context."""
    merged = result * call.base_weight
    for stream in call.streams:
        merged = merged + stream.weight * attention(call.query, stream.key, stream.value, None, call.scale)
    return merged.to(result.dtype)
