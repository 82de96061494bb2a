"""Text of the regions beside the prompt in one sequence: what methods of joint attention share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from attnctrl.control import Where
from attnctrl.errors import ControlError
from attnctrl.kernels.groups import TokenGroups
from attnctrl.layout import Layout, Regions, per_prompt, resolve
from attnctrl.sampling import Sampling
from attnctrl.sites import Call, TokenLayout
from attnctrl.text import Text


def with_entities(text: Text, sampling: Sampling, regions: Regions, kept: int) -> Text:
    """The encoded prompt followed by a block for each region, encoded alone: `kept` tokens, or all where all are fewer.

    Behind the prompt rather than before it, so that the prompt's tokens keep their places. Prompts with fewer regions
    get blocks of zeros, and so does a negative prompt that shares the batch: the mask hides them. Raises ControlError
    where another control has put its blocks there.
    """
    if text.positive.shape[1] != sampling.text_tokens:
        raise ControlError(
            "two controls put texts of regions beside the prompt of a model with joint attention, where one can: use "
            "one of EliGen and RegionPrompts."
        )
    lists = per_prompt(regions, sampling.prompt_count)
    most = max(len(rs) for rs in lists)
    encoded = [sampling.encode([r.text for r in rs]).positive[:, :kept] if rs else None for rs in lists]
    kept = max(block.shape[1] for block in encoded if block is not None)
    blocks = text.positive.new_zeros(len(lists), most * kept, text.positive.shape[-1])
    for row, block in enumerate(encoded):
        if block is not None:
            block = F.pad(block, (0, 0, 0, kept - block.shape[1]))
            blocks[row, : len(block) * kept] = block.flatten(0, 1).to(blocks)
    blocks = blocks.repeat_interleave(sampling.images_per_prompt, dim=0)
    changed = text.change(positive=torch.cat([text.positive, blocks], dim=1))
    if text.negative is not None:
        changed = changed.change(negative=F.pad(text.negative, (0, 0, 0, blocks.shape[1])))
    return changed


@dataclass
class Entities:
    """The regions of one sampling with the places of their text blocks, and the masks made so far.

    prompt: how many text tokens the prompt itself has. A mask is made once for all layers that agree on the places
    of their tokens.
    """

    layout: Layout
    prompt: int
    masks: dict[Any, TokenGroups | None] = field(default_factory=dict)

    @classmethod
    def begin(cls, sampling: Sampling, regions: Regions, where: Where) -> Entities:
        """Raises ControlError for models without joint attention and for regions that are empty on the grid."""
        if not where.select(sampling.sites, sampling.latent_grid):
            kinds = ", ".join(sorted({site.kind for site in sampling.sites}))
            raise ControlError(
                f"entities need joint attention, where text and latents share one sequence; this model has {kinds}: "
                "use RegionPrompts or RegionMask."
            )
        return cls(resolve(sampling, regions, where, how="any", find=False), sampling.text_tokens)

    def mask(self, call: Call, make: Callable[[Places], TokenGroups]) -> TokenGroups | None:
        """The groups that `make` builds for calls of this shape, made once; None where the text holds no blocks."""
        text, latent = call.queries.text, call.queries.latent
        key = (make, text.start, text.stop, latent.start, latent.stop, call.query.shape[2])
        if key not in self.masks:
            self.masks[key] = make(self.places(call)) if text.stop - text.start > self.prompt else None
        return self.masks[key]

    def places(self, call: Call) -> Places:
        """Where everything stands in the sequence of a call."""
        return Places(self.layout, self.prompt, call.queries, call.query.shape[2])


class Places:
    """Where everything stands in one joint sequence, as membership of tokens: bool (batch, tokens) each.

    prompt, latents: the prompt's own text; the picture's tokens, references included. entities: (batch, regions,
    tokens), the text block of each region. inside: (batch, regions, tokens), the latents of each region.
    """

    def __init__(self, layout: Layout, prompt: int, tokens: TokenLayout, total: int) -> None:
        """prompt: how many text tokens are the prompt's own. tokens: of a sequence of `total` that holds latents."""
        text, latent, device = tokens.text, tokens.latent, layout.device
        batch, regions = layout.valid.shape
        kept = (text.stop - text.start - prompt) // regions
        self.prompt = torch.zeros(batch, total, dtype=torch.bool, device=device)
        self.prompt[:, text.start : text.start + prompt] = True
        self.entities = torch.zeros(batch, regions, total, dtype=torch.bool, device=device)
        for r in range(regions):
            start = text.start + prompt + r * kept
            self.entities[:, r, start : start + kept] = layout.valid[:, r, None]
        self.inside = torch.zeros(batch, regions, total, dtype=torch.bool, device=device)
        assert tokens.grid is not None
        self.inside[:, :, latent] = layout.mask(tokens.grid, "any") > 0
        self.latents = torch.ones(batch, total, dtype=torch.bool, device=device)
        self.latents[:, text] = False
