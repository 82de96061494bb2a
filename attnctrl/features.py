"""Features of residual blocks, skip connections and LoRAs, for controls that edit what is not attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from attnctrl.errors import ControlError
from attnctrl.sampling import Active, FeatureEdit
from attnctrl.sites import Site

if TYPE_CHECKING:
    from attnctrl.sampler import Sampler


def hook(sampler: Sampler, active: Active, site: Site, edit: FeatureEdit) -> Any:
    """Have a control edit what a residual block or LoRA adds, or what skip connections hand a part of the decoder.

    For this sampling; returns the handle that removes it. Raises ControlError under torch.compile, and for sites that
    the model has not got.
    """
    who, family = active.control.name, sampler.family
    if family.compiled:
        raise ControlError(f"{who} edits features of the model: use the pipeline without torch.compile.")
    known = family.adapters() if site.kind.endswith("adapter") else [*family.residuals(), *family.skips()]
    module = next((m for s, m in known if s == site), None)
    if module is None:
        raise ControlError(f'{who} wants the features of "{site.name}", which is no residual block of the model.')

    def edited(features: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...] | None:
        installation = sampler.run.installation
        # The model is shared: other threads' runs, and the samplings before and inside this one, pass.
        if installation is None or installation.current() is not sampler.run or sampler.run.sampler is not sampler:
            return None
        work = sampler.work(site)
        if work is None:
            return None
        changed = tuple(one.clone() for one in features)
        for branch in work.branches:
            if any(one is active for one in work.active[branch.name]):
                with work.report.timed(active.index, who, "features", work.step.index, site.name):
                    for one, made in zip(features, changed, strict=True):
                        made[branch.rows] = edit(one[branch.rows], work.step)
        return changed

    def added(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        found = edited((output,))
        return None if found is None else found[0]

    def handed(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        found = edited(kwargs["res_hidden_states_tuple"])
        return None if found is None else (args, {**kwargs, "res_hidden_states_tuple": found})

    if site.kind == "skip":
        return module.register_forward_pre_hook(handed, with_kwargs=True)
    return module.register_forward_hook(added)
