"""What the sparse controls share: where the latents stand in a sequence, masks over all of it, and the report.

Common to all of them: text (and reference tokens) see everything and are seen by everything; a grid of any size will
do, for blocks may be short; and where skipping saves no time full attention runs, which the report says.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F

from attnctrl.control import Control, Where, param
from attnctrl.errors import ControlError
from attnctrl.kernels import (
    BlockAxis,
    SparseBlocks,
    TokenGroups,
    TokenOrder,
    block_attention,
    padded,
    restricted,
    why_full,
)
from attnctrl.kernels.blocks_axis import BLOCK_SIZES
from attnctrl.sampling import Sampling
from attnctrl.sites import Call, Grid

LATENTS = Where(kinds=("self", "joint"))
"""The sites where latents attend to latents."""
BOTH = ("cond", "uncond")

Made = TypeVar("Made")


def block_size(default: int) -> Any:
    """The field of a control for its block size."""
    return param(default, "tokens per block; 64 or 128 is fast on a GPU, less is for small models", choices=BLOCK_SIZES)


def sink_frames(default: int) -> Any:
    """The field of a control for the frames that every query sees."""
    return param(default, "first latent frames that every query sees: an attention sink, or given pictures", 0, 16)


def falls_back() -> Any:
    """The field of a control that allows full attention where skipping does not pay."""
    return param(True, "full attention where skipping blocks would save no time; off: the mask holds everywhere")


@dataclass(frozen=True)
class Sequence:
    """Where latents stand among the tokens: `before` of text, the latents' grid, and `after` of text or references."""

    grid: Grid
    before: int
    after: int

    @classmethod
    def of(cls, call: Call, name: str) -> Sequence:
        """That of a call. Raises ControlError where queries and keys are not the same tokens on a grid."""
        layout, count = call.queries, call.query.shape[2]
        latents = layout.latent.stop - layout.latent.start
        alike = call.keys == layout and call.key.shape[2] == count
        if not alike or layout.grid is None or prod(layout.grid) != latents:
            raise ControlError(
                f"{name} needs queries and keys that are one sequence with all latents of a grid, which "
                f"{call.site.name} has not: give it sites of kind self or joint, without controls that "
                "leave tokens out or add keys."
            )
        return cls(layout.grid, layout.latent.start, count - layout.latent.stop)

    @property
    def latents(self) -> int:
        return prod(self.grid)

    @property
    def tokens(self) -> int:
        return self.before + self.latents + self.after

    def order(self, latents: torch.Tensor) -> TokenOrder:
        """The whole sequence with its latents in another order, int64 (heads or 1, latents) or (latents,)."""
        rows = latents.view(-1, self.latents) + self.before
        every = torch.arange(self.tokens, device=latents.device).expand(len(rows), -1)
        return TokenOrder.of(torch.cat([every[:, : self.before], rows, every[:, self.before + self.latents :]], dim=1))

    def axis(self, segments: tuple[int, ...], size: int) -> BlockAxis:
        """The whole sequence in blocks, of which the latents' segments are given."""
        return BlockAxis(tuple(n for n in (self.before, *segments, self.after) if n), size)

    def blocks(
        self, latents: BlockAxis, visited: torch.Tensor, pattern: torch.Tensor | None = None, **more: Any
    ) -> SparseBlocks:
        """The mask of the whole sequence from that among the latents, (batch or 1, heads or 1, blocks, blocks).

        latents: how they make blocks. Text and references see everything and are seen by all. more: of `SparseBlocks`.
        """
        before, after = (-(-count // latents.size) for count in (self.before, self.after))
        axis, around = self.axis(latents.segments, latents.size), (before, after, before, after)
        if pattern is not None:
            more["pattern"] = F.pad(pattern, around)
        return SparseBlocks(F.pad(visited, around, value=True), axis, axis, **more)

    def fixed(
        self,
        latents: BlockAxis,
        visited: torch.Tensor,
        device: torch.device,
        pattern: torch.Tensor | None = None,
        patterns: torch.Tensor | None = None,
    ) -> SparseBlocks:
        """`blocks` of a mask that is made once, on the CPU, for a device: its density is counted beforehand."""
        made = self.blocks(latents, visited, pattern, patterns=patterns)
        return replace(made, share=made.density()).to(device)

    def chosen(self, latents: BlockAxis, visited: torch.Tensor, density: float) -> SparseBlocks:
        """`blocks` of a mask that is made in every call and holds the share `density` of the latents' blocks.

        On a GPU the share of all pairs is told from that, as if all blocks were whole, lest it be waited for.
        """
        text = 1 - (self.latents / self.tokens) ** 2
        share = None if visited.device.type == "cpu" else min(1.0, text + (1 - text) * density)
        return self.blocks(latents, visited, share=share)


class Sparse:
    """What a sparse control keeps during a run: things made once, the last padding, and where to report."""

    def __init__(self, control: Control, sampling: Sampling) -> None:
        self.name, self.report = control.name, sampling.report
        self.made: dict[Hashable, Any] = {}
        self.padding: dict[Any, Any] = {}

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` makes, the first time that this key is asked for."""
        if key not in self.made:
            with torch.inference_mode(False), torch.no_grad():
                self.made[key] = make()
        found: Made = self.made[key]
        return found

    def attend(
        self,
        call: Call,
        mask: SparseBlocks,
        fall_back: bool,
        order: TokenOrder | None = None,
        ordered: tuple[torch.Tensor, torch.Tensor] | None = None,
        form: str | None = None,
    ) -> torch.Tensor | None:
        """The attention of the call under a mask, reported; None where it should be full.

        order: of the tokens that the mask speaks of. ordered: query and key in it, where they have been made. form: of
        `block_attention`.
        """
        why = why_full(call.query, mask) if fall_back else ""
        if why:
            self.visited(call, 1.0, "full", why)
            return None
        mask = self.visible(call, mask, order)
        query, key = ordered or (moved(call.query, order), moved(call.key, order))
        result = block_attention(query, key, moved(call.value, order), mask, call.scale, form=form)
        known = mask.known_density()
        self.visited(call, mask.counted() if known is None else known, result.form)
        return result.output if order is None else order.restore(result.output)

    def visited(self, call: Call, share: float | torch.Tensor, form: str, why: str = "") -> None:
        """Put what one call visited into the report."""
        self.report.visit((call.site.name, call.step.index, call.branch), self.name, share, form, why)

    def visible(self, call: Call, mask: SparseBlocks, order: TokenOrder | None) -> SparseBlocks:
        """The mask less what the model and other controls hide in this call."""
        seen = call.seen
        if seen is None:
            return mask
        if isinstance(seen, torch.Tensor) and seen.shape[1:3] == (1, 1):
            try:
                return padded(mask.memo, seen, lambda hidden: mask.hide_keys(self._moved_keys(call, hidden, order)))
            except ValueError as error:
                raise ControlError(f"{self.name} at {call.site.name}: {error}") from None
        if isinstance(seen, torch.Tensor):
            return self._beside(call, mask, order, seen)
        kept: WeakKeyDictionary[TokenGroups, SparseBlocks] = mask.memo.setdefault("beside", WeakKeyDictionary())
        if seen not in kept:
            kept[seen] = self._beside(call, mask, order, seen)
        return kept[seen]

    def _moved_keys(self, call: Call, hidden: torch.Tensor, order: TokenOrder | None) -> torch.Tensor:
        """Hidden keys, (batch or 1, keys), in an order."""
        if order is None:
            return hidden
        if order.order.shape[0] == 1:
            return hidden[:, order.order[0]]
        if bool(hidden[:, call.keys.latent].any()):  # where no latents are hidden, nothing that is hidden moves
            raise ControlError(
                f"{self.name} orders the latents of each head in a way of its own, so that none may be hidden beside "
                f"it, as a mask at {call.site.name} does: give one of the two other sites (where)."
            )
        return hidden

    def _beside(
        self, call: Call, mask: SparseBlocks, order: TokenOrder | None, seen: torch.Tensor | TokenGroups
    ) -> SparseBlocks:
        if isinstance(seen, torch.Tensor) and seen.dtype != torch.bool:
            raise ControlError(
                f"{self.name} cannot work beside a mask that adds to the scores of {call.site.name}, of shape "
                f"{tuple(seen.shape)}: give one of the two other sites (where) or steps (window)."
            )
        token = torch.arange(mask.queries, device=mask.device)[None] if order is None else order.order
        batch = seen.shape[0] if isinstance(seen, torch.Tensor) else max(len(seen.query_bits), len(seen.key_bits))
        heads = max(token.shape[0], seen.shape[1] if isinstance(seen, torch.Tensor) else 1)

        def of(tensor: torch.Tensor, axis: int, index: torch.Tensor) -> torch.Tensor:
            return index if tensor.shape[axis] > 1 else torch.zeros_like(index)

        def rule(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            here = of(token, 0, h)
            q, k = token[here, q], token[here, k]
            if isinstance(seen, torch.Tensor):
                return seen[of(seen, 0, b), of(seen, 1, h), of(seen, 2, q), of(seen, 3, k)]
            bits, other = seen.query_bits, seen.key_bits
            return (bits[of(bits, 0, b), q] & other[of(other, 0, b), k]) != 0

        return restricted(mask, rule, batch, heads)


def moved(tensor: torch.Tensor, order: TokenOrder | None) -> torch.Tensor:
    """A tensor (batch, heads, tokens, channels) in an order, if there is one."""
    return tensor if order is None else order.apply(tensor)
