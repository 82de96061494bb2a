"""Features of residual blocks and of LoRAs, for controls that edit what is not attention: a hook of one run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from attnctrl.errors import ControlError
from attnctrl.sampling import Active, FeatureEdit
from attnctrl.sites import Site

if TYPE_CHECKING:
    from attnctrl.sampler import Sampler


def hook(sampler: Sampler, active: Active, site: Site, edit: FeatureEdit) -> Any:
    """Have a control edit what the residual block or LoRA `site` adds, for this sampling.

    Returns the handle that removes it. Raises ControlError under torch.compile, and for sites that the model has not.
    """
    who = active.control.name
    if sampler.family.compiled:
        raise ControlError(f"{who} edits features of the model: use the pipeline without torch.compile.")
    family = sampler.family
    known = family.adapters() if site.kind.endswith("adapter") else family.residuals()
    module = next((m for s, m in known if s == site), None)
    if module is None:
        raise ControlError(f'{who} wants the features of "{site.name}", which is no residual block of the model.')

    def edited(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        installation = sampler.run.installation
        # The model is shared: other threads' runs, and the samplings before and inside this one, pass.
        if installation is None or installation.current() is not sampler.run or sampler.run.sampler is not sampler:
            return None
        work = sampler.work(site)
        if work is None:
            return None
        changed = output.clone()
        for branch in work.branches:
            if any(one is active for one in work.active[branch.name]):
                with work.report.timed(active.index, who, "features", work.step.index, site.name):
                    changed[branch.rows] = edit(output[branch.rows], work.step)
        return changed

    return module.register_forward_hook(edited)
