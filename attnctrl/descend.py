"""The loss point: latents are moved down the gradient of the controls' losses before the denoiser sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from attnctrl.control import Descent
from attnctrl.errors import ControlError
from attnctrl.kernels import TokenGroups
from attnctrl.processors.work import StopForward
from attnctrl.sampling import Active, LossValue, Sampling
from attnctrl.sites import Call
from attnctrl.stepmaps import CrossMap, SelfMap, StepMaps

# Gradients in float16 underflow for a loss below 1 and overflow for steep ones; a power of two changes nothing else.
HALF_LOSS_SCALES = (1024.0, 1.0, 1 / 1024)


class Reader:
    """Collects the maps of the sites that the losses read and ends the forward pass after the last one.

    text: how many text tokens the prompt has; what controls put behind it is left out.
    """

    def __init__(self, names: frozenset[str], stop: bool, text: int) -> None:
        self.names, self.stop, self.text = names, stop, text
        self.maps = StepMaps()
        self.closed = False

    def __call__(self, call: Call, probs: torch.Tensor | None, mask: torch.Tensor | TokenGroups | None) -> None:
        # Gradient checkpointing runs the processors again in the backward pass, when the maps are already in use. So
        # nothing is computed here that saves a tensor for that pass.
        if self.closed:
            return
        grid = call.queries.grid
        assert grid is not None
        name, latent = call.site.name, call.queries.latent
        if call.site.kind != "cross":
            query, key = call.query[:, :, latent], call.key[:, :, latent]
            self.maps.self_[name] = SelfMap(call.site, grid, query, key, _among(mask, latent), call.scale)
        if call.site.kind != "self":
            assert probs is not None
            self.maps.cross[name] = CrossMap(call.site, grid, probs.mean(dim=1)[..., : self.text])
        if self.stop and len(self.maps.cross.keys() | self.maps.self_.keys()) == len(self.names):
            self.closed = True
            raise StopForward


def _among(mask: torch.Tensor | TokenGroups | None, latent: slice) -> torch.Tensor | TokenGroups | None:
    """The part of a mask that is about latents as queries and as keys."""
    if mask is None:
        return None
    if isinstance(mask, TokenGroups):
        return TokenGroups(mask.query_bits[:, latent], mask.key_bits[:, latent])
    rows = mask if mask.shape[-2] == 1 else mask[..., latent, :]
    return rows if rows.shape[-1] == 1 else rows[..., latent]


@dataclass
class _Member:
    """One loss in the joint descent: which pictures still take part."""

    active: Active
    descent: Descent
    names: set[str]
    open: torch.Tensor


def descend(
    sampling: Sampling,
    losses: list[tuple[Active, Descent, set[str]]],
    sample: torch.Tensor,
    latents: Callable[[torch.Tensor], torch.Tensor],
    forward: Callable[[torch.Tensor, Reader], Any],
    stop: bool,
) -> torch.Tensor:
    """The change that the losses make to the conditional rows of the denoiser's input.

    sample: those rows; what is no latents, such as the conditions of inpainting, stays as it is. latents: gives the
    view of the sampler's latents in it. forward: runs the denoiser on a sample while the reader listens. stop: end
    that pass after the last map read. Returns the change of the latents in float32. All losses share one pass per
    iteration and move the latents together; each picture stops on its own.
    """
    step = sampling.step
    assert step is not None
    wanted = frozenset().union(*(names for _, _, names in losses))
    # Fresh tensors with inference mode off: ComfyUI calls from inside it, where no gradient exists.
    with torch.inference_mode(False), torch.enable_grad():
        members = [
            _Member(active, descent, names, torch.ones(len(sample), dtype=torch.bool, device=sample.device))
            for active, descent, names in losses
        ]
        moved = sample.clone().detach()
        start = latents(moved).float().clone()
        for iteration in range(max(m.descent.iterations for m in members)):
            running = [m for m in members if iteration < m.descent.iterations and bool(m.open.any())]
            if not running:
                break
            leaf = moved.detach().requires_grad_(True)
            reader = Reader(wanted, stop, sampling.text_tokens)
            with suppress(StopForward):
                forward(leaf, reader)
            reader.closed = True
            total = sum(_weighted(sampling, running, reader.maps.shared(), iteration))
            if not isinstance(total, torch.Tensor) or not total.requires_grad:
                continue
            gradient = _gradient(total, leaf, running)
            del total  # and with it the graph, before the next pass builds its own
            moved = moved.detach()
            latents(moved).sub_(latents(gradient).to(moved.dtype))
        return latents(moved).float() - start


def _weighted(sampling: Sampling, running: list[_Member], maps: StepMaps, iteration: int) -> Iterator[torch.Tensor]:
    """Each running loss, summed over the pictures that still take part, times its step size."""
    step = sampling.step
    assert step is not None
    for member in running:
        control = member.active.control
        with sampling.report.timed(member.active.index, control.name, "loss", step.index):
            loss = control.loss(maps.only(member.names), step, member.active.state)
        values = tuple(float(v) for v in loss.value.detach())
        sampling.losses.append(LossValue(control.name, step.index, iteration, values))
        if loss.done is not None:
            member.open &= ~loss.done.to(member.open.device)
        chosen = loss.value[member.open]
        if chosen.numel():
            yield member.descent.scale * chosen.sum()


def _gradient(total: torch.Tensor, leaf: torch.Tensor, running: list[_Member]) -> torch.Tensor:
    factors = HALF_LOSS_SCALES if leaf.dtype == torch.float16 else (1.0,)
    for factor in factors:
        (gradient,) = torch.autograd.grad(total * factor, leaf, retain_graph=factor != factors[-1])
        gradient = gradient.float() / factor
        if torch.isfinite(gradient).all():
            return gradient
    names = ", ".join(m.active.control.name for m in running)
    raise ControlError(
        f"the gradient of {names} is not finite: lower the scale, or run the denoiser in float32 or bfloat16."
    )
