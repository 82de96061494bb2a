"""The readings from which a PAROAttention plan is made: each head's attention in each order of the axes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from attnctrl.control import Control, Where
from attnctrl.controls.sparse.common import BOTH, LATENTS, Sequence
from attnctrl.controls.sparse.oracle_blocks import SCORES, block_mass
from attnctrl.controls.sparse.paro_plan import AXES, ParoPlan, SitePlan, axis_orders, packed
from attnctrl.kernels import BlockAxis, TokenOrder, top_blocks
from attnctrl.sampling import Sampling
from attnctrl.sites import Call, Grid

EMPTY = 0.1
"""A block is empty where its mean probability is below this part of that of even attention."""


def block_statistics(
    query: torch.Tensor, key: torch.Tensor, orders: torch.Tensor, axis: BlockAxis, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and largest probability of each block in each order: float32 (batch, heads, orders, blocks, blocks).

    query, key: (batch, heads, tokens, head_dim); orders: int64 (orders, tokens).
    """
    batch, heads, tokens, _ = query.shape
    device, place = query.device, axis.block_of_token(query.device)[0]
    shape = batch, heads, len(orders), axis.blocks, axis.blocks
    total, peak = (torch.zeros(shape, device=device) for _ in range(2))
    blocks = torch.empty_like(orders).scatter_(1, orders, place.expand_as(orders))  # of each token, by order
    for part in torch.arange(tokens, device=device).split(max(1, SCORES // (batch * heads * tokens))):
        seen = (key @ query[:, :, part].transpose(-1, -2)).float().mul_(scale).softmax(dim=2)  # (.., keys, part)
        for number, order in enumerate(orders):
            cut = axis.cut(seen[:, :, order])
            rows = blocks[number, part]
            for into, by_key in ((total, cut.sum(dim=3)), (peak, cut.amax(dim=3))):
                by_query = by_key.transpose(-1, -2).contiguous()  # (batch, heads, part, blocks)
                if into is total:
                    into[:, :, number].index_add_(2, rows, by_query)
                else:
                    place = rows[:, None].expand_as(by_query)
                    into[:, :, number].scatter_reduce_(2, place, by_query, "amax")
    lengths = axis.bounds(device)[1]
    return total / (lengths[:, None] * lengths), peak


def order_costs(mean: torch.Tensor, peak: torch.Tensor, tokens: int, alpha: float) -> torch.Tensor:
    """How badly each order suits blocks: float32 (heads, orders), lower is better; of mean and peak as above.

    alpha * share of blocks that are not empty + (1 - alpha) * their mean incoherence peak / mean, each as a share of
    its sum over the orders.
    """
    full = mean >= EMPTY / tokens
    dense = full.float().mean(dim=(-2, -1))
    ratio = torch.where(full, peak / mean.clamp(min=1e-30), 0.0)
    incoherence = ratio.sum(dim=(-2, -1)) / full.sum(dim=(-2, -1)).clamp(min=1)
    terms = (term / term.sum(dim=-1, keepdim=True).clamp(min=1e-30) for term in (dense, incoherence))
    sparse, quantised = terms
    return (alpha * sparse + (1 - alpha) * quantised).mean(dim=0)


class Readings:
    """What a calibration run has read so far, by site; kept on the CPU."""

    def __init__(self) -> None:
        self.grids: dict[str, Grid] = {}
        self.costs: dict[str, torch.Tensor] = {}
        self.mass: dict[tuple[str, int], torch.Tensor] = {}

    def orders(self) -> dict[str, torch.Tensor]:
        """The order that costs least, int64 (heads,) by site."""
        return {site: costs.argmin(dim=1) for site, costs in self.costs.items()}

    def plan(self, control: ParoCalibration, density: float) -> ParoPlan:
        """The plan that keeps the blocks of most mass; every block keeps itself."""
        assert control.orders is not None
        sites = {site: SitePlan(self.grids[site], order, {}) for site, order in control.orders.items()}
        for (site, phase), mass in self.mass.items():
            own = torch.eye(mass.shape[-1], dtype=torch.bool)
            sites[site].masks[phase] = packed(top_blocks(mass[None], density, own, "head")[0])
        return ParoPlan(control.block, density, control.phases, sites)


@dataclass(frozen=True)
class ParoCalibration(Control):
    """Reads, without changing anything, what PAROAttention's plan is made from; used by `pipelines.calibrate_paro`.

    orders: None to compare the six orders; then those that were chosen, int64 (heads,) by site, to add up the mass of
    the blocks in them. alpha: weight of sparsity against quantisation in the comparison. The paper's metric is of this
    form; its alpha and threshold are not public. Text has no part in it.
    """

    paper: ClassVar[str] = "arXiv 2506.16054"

    block: int = 64
    phases: int = 4
    alpha: float = 0.5
    orders: dict[str, torch.Tensor] | None = None
    where: Where = field(default=LATENTS, kw_only=True)
    branches: tuple[str, ...] = field(default=BOTH, kw_only=True)

    def begin(self, sampling: Sampling) -> Readings:
        return Readings()

    @torch.no_grad()
    def attend(self, call: Call, state: Any) -> None:
        sequence, site = Sequence.of(call, self.name), call.site.name
        latents = slice(sequence.before, sequence.before + sequence.latents)
        query, key = (tensor.detach()[:, :, latents] for tensor in (call.query, call.key))
        axis = BlockAxis((sequence.latents,), self.block)
        orders = axis_orders(sequence.grid).to(query.device)
        state.grids[site] = sequence.grid
        if self.orders is None:
            mean, peak = block_statistics(query, key, orders, axis, call.scale)
            costs = order_costs(mean, peak, sequence.latents, self.alpha).cpu()
            state.costs[site] = state.costs.get(site, torch.zeros(len(costs), len(AXES))) + costs
            return
        order = TokenOrder.of(orders[self.orders[site].to(query.device)])
        mass = block_mass(order.apply(query), order.apply(key), axis, call.scale).sum(dim=0).cpu()
        at = site, int(call.step.progress * self.phases)
        state.mass[at] = state.mass[at] + mass if at in state.mass else mass
