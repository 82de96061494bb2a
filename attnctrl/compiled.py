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
from attnctrl.kernels.traced import number_of
from attnctrl.sites import BLOCK_MASKS, MASKS, Site, Step

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


def site_masks(sampler: Sampler, step: Step, sample: torch.Tensor) -> dict[str, torch.Tensor]:
    """The mask of each controlled site: (batch, 1, queries, keys), or the number of its token groups (`number_of`).

    sample: the denoiser's input. The masks are for the conditional rows of a batch of both branches, or for all rows
    of a call of one branch. Raises ControlError for controls that need more than a mask: they would have to leave the
    graph.
    """
    sampling, family = sampler.sampling, sampler.family
    branch = next((b.name for b in sampler.branches() if b.name == "cond"), sampler.branches()[0].name)
    masks: dict[str, torch.Tensor] = {}
    sampler.numbered.clear()
    for site in sampling.sites:
        found: list[torch.Tensor] = []
        groups: TokenGroups | None = None
        for one in sampling.by_site.get(site.name, ()):
            more = one.points & set(ATTENTION_POINTS) - {"mask"}
            if more or (one.control.branches != ("cond",) and not family.separate):
                what = ", ".join(sorted(more)) or "the unconditional branch"
                raise ControlError(
                    f"{one.control.name} acts on {what}, which a compiled model cannot do: use the pipeline without "
                    "torch.compile, or controls that only mask."
                )
            if step.progress not in one.control.window or branch not in one.control.branches:
                continue
            call = family.blank_call(site, step, branch, sampling.latent_grid, sampling.batch, sampler.text, sample)
            with sampling.report.timed(one.index, one.control.name, "mask", step.index, site.name):
                mask = one.control.mask(call, one.state)
            if isinstance(mask, LowRankBias):
                raise ControlError(
                    f"{one.control.name} masks by a low-rank bias, which a compiled model does not take: use the "
                    "pipeline without torch.compile."
                )
            if isinstance(mask, TokenGroups):
                if not family.separate:
                    raise ControlError(
                        f"{one.control.name} masks by token groups, which a compiled {type(family.model).__name__} "
                        "does not take: use the pipeline without torch.compile."
                    )
                groups = mask if groups is None else groups & mask
            elif mask is not None:
                found.append(mask.expand(sampling.batch, -1, -1, -1))
        if groups is not None and found:
            raise ControlError(
                f"at {site.name} one control masks by token groups and another by a mask of shape "
                f"{tuple(found[0].shape)}: they cannot work together."
            )
        if groups is not None:
            # A number names its mask only while somebody keeps it.
            sampler.numbered.append(groups)
            masks[site.name] = number_of(groups)
        combined = combine_masks(found)
        if combined is not None:
            masks[site.name] = combined
    return masks


def own_mask(
    site: Site, masks: dict[str, torch.Tensor] | None, block_masks: dict[str, torch.Tensor] | None
) -> torch.Tensor | None:
    """The mask of one site in what the model handed on; inside the graph."""
    if block_masks is not None:
        # A block compiled on its own shares its graph with its like: the site's name would be a constant of it.
        return block_masks.get(site.kind)
    return None if masks is None else masks.get(site.name)


def with_block_masks(extras: str, sites: list[Site], call: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The call of a block that is compiled on its own, with its own masks by the kind of its sites.

    extras: the keyword of the model's entries for processors (`Names.extras`). sites: those of the block.
    """
    extra = kwargs.get(extras) or {}
    if MASKS in extra:
        extra = dict(extra)
        masks = extra.pop(MASKS)
        extra[BLOCK_MASKS] = {site.kind: masks[site.name] for site in sites if site.name in masks}
        kwargs = {**kwargs, extras: extra}
    return call(*args, **kwargs)
