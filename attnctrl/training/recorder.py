"""`record`: the attention maps of a training step, with their gradients; the model computes what it always does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from diffusers import UNet2DConditionModel

from attnctrl.control import Where
from attnctrl.descend import Reader
from attnctrl.errors import ControlError
from attnctrl.install import put_processor
from attnctrl.processors import family_of
from attnctrl.processors.family import Family, uncompiled
from attnctrl.processors.work import Branch, Work
from attnctrl.report import Report
from attnctrl.sites import Site, Step
from attnctrl.stepmaps import StepMaps

_STEP = Step(index=0, total=1, timestep=0.0, noise=0.0)


class Recorder:
    """What `record` hands out: `maps` are those of the last forward pass, of all rows of its batch."""

    def __init__(self, family: Family, where: Where) -> None:
        self.family, self.where = family, where
        self._sites: list[Site] = []
        self._chosen: frozenset[str] = frozenset()
        self._reader: Reader | None = None
        self._work: Work | None = None

    @property
    def maps(self) -> StepMaps:
        """By layer: `cross` (batch, latent tokens, text tokens), mean over heads, in joint attention as shares of the
        attention to the prompt; `self_` as query and key. Raises ControlError before any forward pass.
        """
        if self._reader is None:
            raise ControlError("nothing is recorded yet: call the model inside the block before reading its maps.")
        return self._reader.maps.shared()

    def work(self, site: Site) -> Work | None:
        """What the processor of `site` has to do in this forward pass."""
        return self._work if site.name in self._chosen else None

    def place(self) -> list[tuple[Any, Any]]:
        """Put our processors on the layers whose stock one we know; each module with the one it had."""
        placed = []
        for site, module in self.family.sites():
            stock = module.processor
            if self.family.reproducible(stock):
                put_processor(module, self.family.stand_in(stock, site, self))
                self._sites.append(site)
                placed.append((module, stock))
        return placed

    def before(self, model: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """A forward pass begins: the maps of the one before are let go."""
        grid = self.family.latent_grid(args, kwargs)
        rows = slice(0, len(self.family.sample(args, kwargs)))
        text = self.family.text_tokens(args, kwargs, rows)
        self._chosen = frozenset(site.name for site in self.where.select(self._sites, grid))
        if not self._chosen:
            kinds = ", ".join(sorted({site.kind for site in self._sites}))
            known = f"it has layers of the kinds {kinds}" if kinds else "other processors are on all of its layers"
            raise ControlError(f"{self.where} selects no layer of {type(model).__name__} to record: {known}.")
        self._reader = Reader(self._chosen, stop=False, text=text)
        branches = (Branch("cond", rows),)
        self._work = Work(_STEP, grid, text, branches, {}, Report(), self._reader, observed_only=True)

    def after(self, *_: Any) -> None:
        """The pass is over: what gradient checkpointing computes again in the backward pass is not recorded again."""
        assert self._reader is not None
        self._reader.closed = True


@contextmanager
def record(model: Any, where: Where = Where()) -> Iterator[Recorder]:
    """Record the attention maps of every forward pass inside the block, differentiable in the model's weights.

        with record(unet) as recorded:
            predicted = unet(noisy, timesteps, text).sample
            maps = phrase_maps(recorded.maps.mean_cross()[0], tokens)
            loss = F.mse_loss(predicted, noise) + 1e-3 * localisation(maps, masks).mean()
            loss.backward()

    model: the denoiser of a supported family, with or without a LoRA, or a pipeline; of a model that
    DistributedDataParallel or accelerate has wrapped, the model inside, which may then be called through the wrapper.
    where: of which layers, by default all that have text among their keys. The stock processors make the output, which
    is bit-identical; for the maps the projections of the chosen layers are computed once more, so a LoRA with dropout
    draws it once more. Afterwards the model is as it was. Raises ControlError for models without support, for compiled
    ones, inside a control block, and where no layer fits.
    """
    family = family_of(_pipeline_of(model))
    if family.compiled:
        raise ControlError("record() cannot look into a compiled model: record the model before torch.compile.")
    recorder = Recorder(family, where)
    placed = recorder.place()
    denoisers = family.denoisers
    hooks = [d.register_forward_pre_hook(recorder.before, with_kwargs=True) for d in denoisers]
    hooks += [d.register_forward_hook(recorder.after) for d in denoisers]
    try:
        yield recorder
    finally:
        for hook in hooks:
            hook.remove()
        for module, stock in placed:
            put_processor(module, stock)


def _pipeline_of(model: Any) -> Any:
    """What the families know a model by."""
    if hasattr(model, "components"):
        return model
    name = "unet" if isinstance(uncompiled(model), UNet2DConditionModel) else "transformer"
    return SimpleNamespace(**{name: model})
