"""Text of the regions beside the prompt in one sequence: what methods of joint attention share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from attnctrl.control import Control, Where, Window
from attnctrl.errors import ControlError
from attnctrl.kernels.groups import TokenGroups
from attnctrl.layout import Layout, Regions, per_prompt, resolve
from attnctrl.sampling import Sampling
from attnctrl.sites import Call, Stream, TokenLayout
from attnctrl.text import Text


def with_entities(text: Text, sampling: Sampling, regions: Regions, kept: int) -> Text:
    """The encoded prompt followed by a block for each region, encoded alone: `kept` tokens, or all where all are fewer.

    Behind the prompt rather than before it, so that the prompt's tokens keep their places. Prompts with fewer regions
    get blocks of zeros, and so does a negative prompt that shares the batch: the mask hides them. Texts that an
    encoder gives fewer tokens than others end with zeros. Raises ControlError where another control has put its
    blocks there.
    """
    if text.positive.shape[1] != sampling.text_tokens:
        raise ControlError(
            "two controls put texts of regions beside the prompt of a model with joint attention, where one can: use "
            "one of EliGen, RegionalFlux, RAG and RegionPrompts."
        )
    lists = per_prompt(regions, sampling.prompt_count)
    most = max(len(rs) for rs in lists)
    encoded = [sampling.encode([r.text for r in rs]).positive[:, :kept] if rs else text.positive[:0] for rs in lists]
    kept = max(block.shape[1] for block, rs in zip(encoded, lists, strict=True) if rs)
    blocks = text.positive.new_zeros(len(lists), most, kept, text.positive.shape[-1])
    for row, block in enumerate(encoded):
        blocks[row, : len(block), : block.shape[1]] = block[:, :kept].to(blocks)
    blocks = blocks.flatten(1, 2)
    blocks = blocks.repeat_interleave(sampling.images_per_prompt, dim=0)
    changed = text.change(positive=torch.cat([text.positive, blocks], dim=1))
    if text.negative is not None:
        changed = changed.change(negative=F.pad(text.negative, (0, 0, 0, blocks.shape[1])))
    return changed


def check_whole(control: Control) -> None:
    """Raise ControlError for a control that would leave text blocks unmasked in some steps or layers."""
    where = control.where
    if control.window != Window() or any(v is not None for v in (where.blocks, where.near, where.max_tokens)):
        raise ControlError(
            f"{control.name} puts text of the regions into the sequence of every layer and step, where a narrower "
            "window or where would leave it in plain sight: keep these, and use the method's own shares of the run."
        )


def both_in_sequence(control: Control, other: Control) -> str | None:
    """The conflict of two controls that each expect their own text blocks, and no others, behind the prompt."""
    both = not control.idle and not other.idle and getattr(other, "in_sequence", False)
    return "both put text of the regions behind the prompt in the joint sequence; use one of them." if both else None


def beside(call: Call, groups: TokenGroups, share: float) -> Call:
    """The call with a second look at its own keys, under other groups, that counts by `share` in [0, 1].

    It counts for the queries that have a group there; what the others get stays as it is.
    """
    weight = (share * (groups.query_bits != 0))[:, None, :, None].to(call.query.dtype)
    return call.shared(1 - weight, Stream(call.key, call.value, weight, groups))


@dataclass
class Entities:
    """The regions of one sampling with the places of their text blocks, and the masks made so far.

    prompt: how many text tokens the prompt itself has. beside_negative: whether blocks of zeros stand behind the
    negative prompt; where it is encoded in a call of its own, none do. A mask is made once for all layers that agree
    on the places of their tokens.
    """

    layout: Layout
    prompt: int
    beside_negative: bool = False
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
        layout = resolve(sampling, regions, where, how="any", find=False)
        return cls(layout, sampling.text_tokens, sampling.appended.get("uncond", 0) > 0)

    def mask(self, call: Call, make: Callable[[Places], TokenGroups]) -> TokenGroups | None:
        """The groups that `make` builds for calls of this shape, made once; None where the text holds no blocks."""
        if call.branch == "uncond" and not self.beside_negative:
            return None
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
