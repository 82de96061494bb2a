"""Agent attention: queries look at a few agents, and these at the keys; beside merging of similar tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from attnctrl.control import Control, Where, param
from attnctrl.controls.sparse.common import BOTH, Sequence, Sparse, falls_back
from attnctrl.controls.sparse.merging import destinations, merged
from attnctrl.errors import ControlError
from attnctrl.kernels import attention
from attnctrl.sampling import Sampling
from attnctrl.sites import Call

PAYS_FROM = 4096
"""Below so many tokens full attention costs less than the search for similar tokens."""


def agent_attention(
    query: torch.Tensor,
    agents: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    sharpness: float,
    shortcut: float,
) -> torch.Tensor:
    """softmax(q a^T scale^sharpness) (softmax(a k^T scale) v) + shortcut * v: (batch, heads, tokens, head_dim).

    query, key, value: (batch, heads, tokens, head_dim); agents: (batch, heads, agents, head_dim).
    """
    gathered = attention(agents, key, value, None, scale)
    return attention(query, agents, gathered, None, scale**sharpness) + shortcut * value


@dataclass(frozen=True)
class AgentAttention(Control):
    """Agent attention (arXiv 2312.08874) as the authors put it on Stable Diffusion without training: AgentSD.

    First the share `ratio` of the tokens goes into the most similar one of a cell, as in ToMe: one random token of each
    cell x cell takes them up. Until `agents_until` of the run the cells have `cell` tokens a side, and a stronger
    merging, of the share `agent_ratio`, makes the agents, used where they are fewer than half of the tokens; then cells
    of 2 and merging alone. What a token became is copied back to all that went into it.

    Departures: what is merged is query, key and value, which is the same, for their projections are linear; similarity
    is of the keys, as in ToMe's own paper, because a layer's input is not known here. Every site and step draws its
    cells' tokens from `seed`, the same ones in both guidance branches.

    By default the finest self-attention layers of UNets, 64x64 tokens at 512x512. Families: all with self-attention.
    """

    paper: ClassVar[str] = "arXiv 2312.08874"
    fixes: ClassVar[str] = "slow generation of large pictures by UNets"

    ratio: float = param(0.4, "share of the tokens that is merged", 0, 0.75)
    agent_ratio: float = param(0.95, "share of the tokens that is merged to make the agents", 0, 1)
    agents_until: float = param(0.4, "part of the run in which agents are used", 0, 1)
    cell: int = param(4, "side of the cells in that part", 2, 16)
    sharpness: float = param(0.3, "power of the scale between queries and agents; below 1 is sharper", 0, 1)
    shortcut: float = param(0.075, "weight of the values that are added", 0, 1)
    seed: int = param(0, "of the draw of the tokens that take others up", 0, 2**31 - 1)
    fall_back: bool = falls_back()
    where: Where = field(default=Where(kinds=("self",), near=1.0), kw_only=True)
    branches: tuple[str, ...] = field(default=BOTH, kw_only=True)

    @property
    def idle(self) -> bool:
        return self.window.empty or (self.ratio == 0 and (self.agents_until == 0 or self.agent_ratio == 0))

    def begin(self, sampling: Sampling) -> Sparse:
        return Sparse(self, sampling)

    def attend(self, call: Call, state: Any) -> torch.Tensor | None:
        sequence, tokens = Sequence.of(call, self.name), call.query.shape[2]
        if sequence.before or sequence.after or call.seen is not None:
            raise ControlError(
                f"{self.name} merges the tokens of self-attention without a mask, which {call.site.name} has not: give "
                'it sites of kind "self".'
            )
        if self.fall_back and tokens < PAYS_FROM:
            state.visited(call, 1.0, "full", f"fewer than {PAYS_FROM} tokens")
            return None
        agents_now = call.step.progress < self.agents_until
        generator = torch.Generator().manual_seed(hash((self.seed, call.step.index, call.site.order)) % 2**63)
        into = destinations(sequence.grid, self.cell if agents_now else 2, generator).to(call.query.device)
        features = call.key.detach().transpose(1, 2).flatten(2)
        fewer = merged(features, into, int(tokens * self.ratio))
        query, key, value = (fewer.mean(tensor) for tensor in (call.query, call.key, call.value))
        few = merged(features, into, int(tokens * self.agent_ratio)) if agents_now else None
        if few is not None and 2 * few.kept < fewer.kept:
            agents = few.mean(call.query)
            output = agent_attention(query, agents, key, value, call.scale, self.sharpness, self.shortcut)
            pairs, form = 2 * few.kept * fewer.kept, "agents"
        else:
            output = attention(query, key, value, None, call.scale)
            pairs, form = fewer.kept**2, "merged tokens"
        state.visited(call, pairs / tokens**2, form)
        return fewer.spread(output)
