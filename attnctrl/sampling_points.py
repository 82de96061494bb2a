"""The points of the sampling loop that need the denoiser's arguments: noise, loss and guide."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from attnctrl.calls import ordinary
from attnctrl.control import Where
from attnctrl.descend import Reader, descend
from attnctrl.errors import ControlError
from attnctrl.guidance import Crop, Prediction
from attnctrl.processors.family import Family
from attnctrl.processors.work import StopForward
from attnctrl.sampling import Active
from attnctrl.sites import MASKS, Grid, Step
from attnctrl.stepmaps import StepMaps

if TYPE_CHECKING:
    from attnctrl.sampler import Sampler


Forward = Callable[[torch.Tensor, torch.Tensor | None, Reader], Any]


@contextmanager
def reading(sampler: Sampler, args: tuple, kwargs: dict[str, Any], who: str) -> Iterator[tuple[Forward, torch.Tensor]]:
    """A denoiser pass on a sample and a text of the conditional rows, with a reader; and the text that they have.

    args, kwargs: of the step's first call. who: the control that reads, for messages. Stays open until the gradients
    are taken: checkpointing runs layers again in the backward pass.
    """
    if sampler.family.compiled:
        raise ControlError(f"{who} needs gradients: use the pipeline without torch.compile.")
    # A caller's inference mode left tensors that autograd must not save.
    args, kwargs = ordinary((args, kwargs))
    args, kwargs = sampler.family.picked(args, kwargs, sampler.rows, sampler.conditional_rows())
    if sampler.family.checkpointed:
        assert sampler.run.installation is not None
        sampler.run.installation.carry_context()

    def forward(sample: torch.Tensor, text: torch.Tensor | None, reader: Reader) -> None:
        sampler.reader = reader
        sampler.forward(args, kwargs, sample, text)

    try:
        with sampler.inside():
            yield forward, sampler.family.signature.get(args, kwargs, sampler.family.names.text)
    finally:
        sampler.reader = None


def site_names(sampler: Sampler, where: Where) -> set[str]:
    """The sites that `where` selects in the denoiser of this step."""
    sites = where.select(sampler.sampling.sites, sampler.sampling.latent_grid)
    expert = sampler.family.denoisers.index(sampler.denoiser)
    return {s.name for s in sites if s.expert == expert}


def edit_noise(sampler: Sampler, args: tuple, kwargs: dict[str, Any], sample: torch.Tensor, step: Step) -> None:
    """The noise point: what the sampling starts from; the change reaches the denoiser and the scheduler."""
    # The sampler's latents are noise times init_noise_sigma, the denoiser's input those times its scale.
    factor = sampler.schedule.input_scale(step) * sampler.schedule.start_scale
    rows, family, grid = sampler.conditional_rows(), sampler.family, sampler.sampling.latent_grid
    for one in sampler.active_at("noise", step):
        given = ordinary(sampler.moved(sample)[rows])
        start = family.unpacked(family.latents(given, grid).float() / factor, grid)
        # What a control learns here must not be of a caller's inference mode.
        with torch.inference_mode(False), torch.no_grad(), ExitStack() as stack:
            sampler.sampling.maps_of = partial(_maps_of, sampler, args, kwargs, given, factor, one, stack)
            with sampler.sampling.report.timed(one.index, one.control.name, "noise", step.index):
                wanted = one.control.noise(start, sampler.sampling, one.state)
            sampler.sampling.maps_of = None
        # The difference before the factor: noise handed back unchanged must change nothing, rounding included.
        sampler.change.add(family.packed((wanted - start) * factor, grid))


def _maps_of(
    sampler: Sampler,
    args: tuple,
    kwargs: dict[str, Any],
    given: torch.Tensor,
    factor: float,
    one: Active,
    stack: ExitStack,
    noise: torch.Tensor,
    where: Where,
) -> StepMaps:
    """See `Sampling.maps_of`; the pass stays open in `stack`."""
    stack.close()
    forward, _ = stack.enter_context(reading(sampler, args, kwargs, one.control.name))
    grid = sampler.sampling.latent_grid
    names, stop = frozenset(site_names(sampler, where)), not sampler.family.checkpointed
    reader = Reader(names, stop, sampler.sampling.text_tokens)
    drawn = given.clone()
    sampler.family.latents(drawn, grid).copy_(sampler.family.packed(noise * factor, grid))
    with suppress(StopForward):
        forward(drawn, None, reader)
    reader.closed = True
    return reader.maps.shared()


def descend_losses(sampler: Sampler, args: tuple, kwargs: dict[str, Any], sample: torch.Tensor, step: Step) -> None:
    """The loss point: the joint descent of every active loss, on the arguments of the step's first call."""
    # The second evaluation of a second-order scheduler ignores the sample it is given.
    if not getattr(sampler.scheduler, "state_in_first_order", True):
        return
    losses = []
    for one in sampler.active_at("loss", step):
        descent = one.control.descent(step)
        if descent is not None and descent.scale != 0 and descent.iterations > 0:
            losses.append((one, descent, site_names(sampler, one.control.where)))
    if not losses:
        return

    def latents(given: torch.Tensor) -> torch.Tensor:
        return sampler.family.latents(given, sampler.sampling.latent_grid)

    cond, stop = sample[sampler.conditional_rows()], not sampler.family.checkpointed
    with reading(sampler, args, kwargs, losses[0][0].control.name) as (forward, text):
        change, words = descend(sampler.sampling, losses, cond, text, latents, forward, stop)
    sampler.change.add(change)
    if words is not None:
        known = sampler.sampling.words
        sampler.sampling.words = words if known is None else known + words


def with_words(sampler: Sampler, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments with the embeddings that losses have learned so far, in the conditional rows alone."""
    learned = sampler.sampling.words
    if learned is None:
        return args, kwargs
    branches = sampler.family.branches(sampler.rows, sampler.sampling.batch, sampler.calls - 1)
    rows = next((b.rows for b in branches if b.name == "cond"), None)
    if rows is None:
        return args, kwargs
    text = sampler.family.signature.get(args, kwargs, sampler.family.names.text).clone()
    text[rows] += learned.to(text.dtype)
    return sampler.family.with_text(args, kwargs, text)


def guided(sampler: Sampler, combined: torch.Tensor, step: Step) -> torch.Tensor:
    """The prediction that the guide controls want in place of the pipeline's combination."""
    family, grid = sampler.family, sampler.sampling.latent_grid

    def drawn() -> torch.Tensor:
        args, kwargs = sampler.asked["cond"]
        return family.unpacked(family.latents(family.sample(args, kwargs), grid), grid)

    uncond, image = sampler.predicted.get("uncond"), sampler.predicted.get("image")
    prediction = Prediction(
        _seen(family, sampler.predicted["cond"], grid),
        None if uncond is None else _seen(family, uncond, grid),
        family.unpacked(combined, grid),
        partial(_again, sampler, None),
        lambda clean: sampler.schedule.prediction(clean, drawn(), step),
        lambda noise: sampler.schedule.prediction_of_noise(noise, drawn(), step),
        lambda made: sampler.schedule.clean(made, drawn(), step),
        _seen(family, sampler.predicted["cond"], grid),
        None if image is None else _seen(family, image, grid),
    )
    for one in sampler.active_at("guide", step):
        prediction = replace(prediction, again=partial(_again, sampler, one))
        with sampler.sampling.report.timed(one.index, one.control.name, "guide", step.index):
            prediction = prediction.after(one.control.guide(prediction, step, one.state))
    return family.packed(prediction.combined, grid).to(combined.dtype)


def _seen(family: Family, output: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The denoiser's output as pictures."""
    return family.unpacked(family.prediction(output, grid), grid)


def _again(
    sampler: Sampler,
    one: Active | None,
    context: torch.Tensor | None = None,
    *,
    pooled: torch.Tensor | None = None,
    crop: Crop | None = None,
    branch: str = "cond",
    controlled: bool = False,
    clean_change: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `Again`; `one` asks."""
    family, sampling, grid = sampler.family, sampler.sampling, sampler.sampling.latent_grid
    args, kwargs = sampler.asked[branch]
    if clean_change is not None:
        assert sampling.step is not None
        moved = family.sample(args, kwargs).clone()
        view = family.latents(moved, grid)
        view += family.packed(sampler.schedule.clean_scale(sampling.step) * clean_change, grid).to(view.dtype)
        args, kwargs = family.with_sample(args, kwargs, moved)
    if controlled:
        assert one is not None
        if context is not None or pooled is not None or crop is not None:
            raise ControlError(
                f"{one.control.name} asks for other text or a part of the picture under controls, which were made for "
                "the text and the picture of the run: ask without `controlled`."
            )
        return _as_predicted(sampler, one, branch, args, kwargs)
    if crop is not None:
        args, kwargs = family.picked(args, kwargs, sampling.batch, crop.pictures)
        args, kwargs = family.with_crop(args, kwargs, grid, crop.rows, crop.columns)
        grid = (grid[0], crop.rows.stop - crop.rows.start, crop.columns.stop - crop.columns.start)
    # Without text is with the negative one.
    appended = sampling.appended.get("cond" if branch == "cond" else "uncond", 0)
    if context is None and appended:
        context = family.signature.get(args, kwargs, family.names.text)[:, :-appended]
    if pooled is not None:
        args, kwargs = family.with_pooled(args, kwargs, pooled)
    if family.compiled:
        # The masks of the step travel in the keyword arguments that are sent again here.
        kwargs = family.with_extra(kwargs, MASKS, {})
    with sampler.inside(silent=True):
        return _seen(family, family.output(sampler.forward(args, kwargs, None, context)), grid)


def _as_predicted(sampler: Sampler, one: Active, branch: str, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """A further prediction of a branch under all controls; `one` asks."""
    family, sampling, text = sampler.family, sampler.sampling, sampler.text
    # Of separate calls the last one's text may have had another length.
    sampler.text = family.text_tokens(args, kwargs, slice(0, sampling.batch))
    try:
        with sampler.inside(asking=(one, branch)):
            return _seen(family, family.output(sampler.forward(args, kwargs, None, None)), sampling.latent_grid)
    finally:
        sampler.text = text
