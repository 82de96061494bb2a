"""Controls inside torch.compile: masks are made beforehand and handed in as tensors, no Python state is touched.

A module compiled in place (`module.compile()`) has its hooks traced with it, and our hooks are Python. So we do not
hook such a module but stand around its compiled call, which torch keeps in an attribute of the module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from attnctrl.control import ATTENTION_POINTS
from attnctrl.errors import ControlError
from attnctrl.kernels import combine_masks
from attnctrl.kernels.groups import TokenGroups
from attnctrl.kernels.low_rank import LowRankBias
from attnctrl.sites import Step

if TYPE_CHECKING:
    from attnctrl.sampler import Sampler


CALL = "_compiled_call_impl"


def compiled_in_place(module: torch.nn.Module) -> bool:
    """Whether `module.compile()` was called."""
    return getattr(module, CALL, None) is not None


def enclose(module: torch.nn.Module, around: Callable[[Callable, tuple, dict[str, Any]], Any]) -> Callable[[], None]:
    """Have `around(call, args, kwargs)` run in place of a compiled call, outside the graph; returns the undoing."""
    call = getattr(module, CALL)

    def enclosed(*args: Any, **kwargs: Any) -> Any:
        return around(call, args, kwargs)

    def undo() -> None:
        if getattr(module, CALL, None) is enclosed:
            setattr(module, CALL, call)

    setattr(module, CALL, enclosed)
    return undo


def site_masks(sampler: Sampler, step: Step) -> dict[str, torch.Tensor]:
    """The mask of each controlled site, (batch, 1, queries, keys), for the conditional rows.

    Raises ControlError for controls that need more than a mask: they would have to leave the graph.
    """
    sampling, masks = sampler.sampling, {}
    like = torch.empty(0, device=sampling.device, dtype=sampling.dtype)
    for site in sampling.sites:
        found = []
        for one in sampling.by_site.get(site.name, ()):
            more = one.points & set(ATTENTION_POINTS) - {"mask"}
            if more or one.control.branches != ("cond",):
                what = ", ".join(sorted(more)) or "the unconditional branch"
                raise ControlError(
                    f"{one.control.name} acts on {what}, which a compiled model cannot do: use the pipeline without "
                    "torch.compile, or controls that only mask."
                )
            if step.progress not in one.control.window:
                continue
            call = sampler.family.blank_call(
                site, step, sampling.latent_grid, sampling.batch, sampling.text_tokens, like
            )
            with sampling.report.timed(one.index, one.control.name, "mask", step.index, site.name):
                mask = one.control.mask(call, one.state)
            if isinstance(mask, (TokenGroups, LowRankBias)):
                raise ControlError(
                    f"{one.control.name} masks by token groups or a low-rank bias, whose kernel a compiled model "
                    "does not call yet: use the pipeline without torch.compile."
                )
            if mask is not None:
                found.append(mask.expand(sampling.batch, -1, -1, -1))
        combined = combine_masks(found)
        if combined is not None:
            masks[site.name] = combined
    return masks
