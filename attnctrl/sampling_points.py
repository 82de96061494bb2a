"""The points of the sampling loop that need the denoiser's arguments: noise, loss and guide."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from attnctrl.calls import ordinary
from attnctrl.descend import Reader, descend
from attnctrl.errors import ControlError
from attnctrl.guidance import Crop, Prediction
from attnctrl.processors.family import Family
from attnctrl.sites import MASKS, Grid, Step

if TYPE_CHECKING:
    from attnctrl.sampler import Sampler


def edit_noise(sampler: Sampler, sample: torch.Tensor) -> None:
    """The noise point: what the sampling starts from; the change reaches the denoiser and the scheduler."""
    for one in [a for a in sampler.sampling.active if "noise" in a.points]:
        step = sampler.sampling.step
        assert step is not None
        # The sampler's latents are noise times init_noise_sigma, the denoiser's input those times its scale.
        factor = sampler.schedule.input_scale(step) * sampler.schedule.start_scale
        rows, grid = sampler.conditional_rows(), sampler.sampling.latent_grid
        start = sampler.family.latents(sampler.moved(sample)[rows], grid).float() / factor
        start = sampler.family.unpacked(start, grid)
        with sampler.sampling.report.timed(one.index, one.control.name, "noise", step.index):
            wanted = one.control.noise(start, sampler.sampling, one.state)
        # The difference before the factor: noise handed back unchanged must change nothing, rounding included.
        sampler.change.add(sampler.family.packed((wanted - start) * factor, grid))


def descend_losses(sampler: Sampler, args: tuple, kwargs: dict[str, Any], sample: torch.Tensor, step: Step) -> None:
    """The loss point: the joint descent of every active loss, on the arguments of the step's first call."""
    # The second evaluation of a second-order scheduler ignores the sample it is given.
    if not getattr(sampler.scheduler, "state_in_first_order", True):
        return
    losses = []
    for one in sampler.active_at("loss", step):
        descent = one.control.descent(step)
        if descent is not None and descent.scale != 0 and descent.iterations > 0:
            sites = one.control.where.select(sampler.sampling.sites, sampler.sampling.latent_grid)
            expert = sampler.family.denoisers.index(sampler.denoiser)
            losses.append((one, descent, {s.name for s in sites if s.expert == expert}))
    if not losses:
        return
    if sampler.family.compiled:
        raise ControlError(f"{losses[0][0].control.name} needs gradients: use the pipeline without torch.compile.")

    checkpointed = sampler.family.checkpointed
    # A caller's inference mode left tensors that autograd must not save.
    args, kwargs = ordinary((args, kwargs))
    args, kwargs = sampler.family.picked(args, kwargs, sampler.rows, sampler.conditional_rows())
    if checkpointed:
        assert sampler.run.installation is not None
        sampler.run.installation.carry_context()

    def forward(leaf: torch.Tensor, reader: Reader) -> None:
        sampler.reader = reader
        sampler.forward(args, kwargs, leaf, None)

    def latents(given: torch.Tensor) -> torch.Tensor:
        return sampler.family.latents(given, sampler.sampling.latent_grid)

    cond = sample[sampler.conditional_rows()]
    try:
        # Until the gradients are taken: checkpointing runs layers again in the backward pass.
        with sampler.inside():
            sampler.change.add(descend(sampler.sampling, losses, cond, latents, forward, stop=not checkpointed))
    finally:
        sampler.reader = None


def guided(sampler: Sampler, combined: torch.Tensor, step: Step) -> torch.Tensor:
    """The prediction that the guide controls want in place of the pipeline's combination."""
    family, grid = sampler.family, sampler.sampling.latent_grid

    def toward(clean: torch.Tensor) -> torch.Tensor:
        args, kwargs = sampler.asked["cond"]
        drawn = family.unpacked(family.latents(family.sample(args, kwargs), grid), grid)
        return sampler.schedule.prediction(clean, drawn, step)

    uncond = sampler.predicted.get("uncond")
    prediction = Prediction(
        _seen(family, sampler.predicted["cond"], grid),
        None if uncond is None else _seen(family, uncond, grid),
        family.unpacked(combined, grid),
        partial(_again, sampler),
        toward,
    )
    for one in sampler.active_at("guide", step):
        with sampler.sampling.report.timed(one.index, one.control.name, "guide", step.index):
            prediction = prediction.after(one.control.guide(prediction, step, one.state))
    return family.packed(prediction.combined, grid).to(combined.dtype)


def _seen(family: Family, output: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The denoiser's output as pictures."""
    return family.unpacked(family.prediction(output, grid), grid)


def _again(
    sampler: Sampler,
    context: torch.Tensor | None = None,
    *,
    pooled: torch.Tensor | None = None,
    crop: Crop | None = None,
    branch: str = "cond",
) -> torch.Tensor:
    """See `Again`."""
    family, sampling, grid = sampler.family, sampler.sampling, sampler.sampling.latent_grid
    args, kwargs = sampler.asked[branch]
    if crop is not None:
        args, kwargs = family.picked(args, kwargs, sampling.batch, crop.pictures)
        args, kwargs = family.with_crop(args, kwargs, grid, crop.rows, crop.columns)
        grid = (grid[0], crop.rows.stop - crop.rows.start, crop.columns.stop - crop.columns.start)
    appended = sampling.appended.get(branch, 0)
    if context is None and appended:
        context = family.signature.get(args, kwargs, family.names.text)[:, :-appended]
    if pooled is not None:
        args, kwargs = family.with_pooled(args, kwargs, pooled)
    if family.compiled:
        # The masks of the step travel in the keyword arguments that are sent again here.
        kwargs = family.with_extra(kwargs, MASKS, {})
    with sampler.inside(silent=True):
        return _seen(family, family.output(sampler.forward(args, kwargs, None, context)), grid)
