"""EliGen: entity prompts beside the prompt, each seen by and seeing its own region alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from attnctrl.control import Control, Where, param
from attnctrl.controls.layout.entities import Entities, Places, both_in_sequence, check_whole, with_entities
from attnctrl.kernels.groups import TokenGroups
from attnctrl.layout import Regions
from attnctrl.sampling import Sampling
from attnctrl.sites import Call
from attnctrl.text import Text


def entity_groups(places: Places) -> TokenGroups:
    """EliGen's mask: latents see each other, the prompt, and the entities of their regions; text blocks are isolated.

    One group holds the latents and the prompt, and one for each entity its text and the latents of its region.
    """
    own = places.entities | places.inside
    return TokenGroups.from_members(torch.stack([places.latents | places.prompt, *own.unbind(1)], dim=-1))


def hidden_groups(places: Places) -> TokenGroups:
    """The entities out of sight: the prompt and the latents see each other as in the stock model."""
    everyone = (places.latents | places.prompt)[..., None]
    return TokenGroups.from_members(everyone)


@dataclass(frozen=True)
class EliGen(Control):
    """EliGen: Entity-Level Controlled Image Generation with Regional Attention (Zhang et al., arXiv 2501.01097).

    Every region's text is encoded alone and stands beside the prompt in the joint sequence. It sees itself and the
    latents of its region, and only these see it; the prompt and all latents see one another. A latent token belongs
    to a region when any part of it does. Departures: entities stand behind the prompt (the order has no meaning where
    text has no positions), and of each only `entity_tokens` tokens are kept, padding included, where the official code
    keeps 512. In the unconditional branch entities are hidden, as by default there.

    The mask alone steers weakly; the authors train a LoRA of the transformer with it. That is a diffusers LoRA like
    any other, loaded before or inside the control block: `pipe.load_lora_weights(...)`, `pipe.disable_lora()`. The
    authors' files come from DiffSynth-Studio. For QwenImage they name the layers as diffusers does. For FLUX.1 they
    may hold DiffSynth's own names (`a_to_qkv`), of which diffusers loads nothing and only warns: convert such a file
    first, and see that `pipe.get_list_adapters()` is not empty. Give as many `entity_tokens` as the LoRA was trained
    with. `attnctrl.shapes.load("dit+entities")` has one, trained with 8.
    Families: joint attention.
    """

    paper: ClassVar[str] = "arXiv 2501.01097"
    fixes: ClassVar[str] = "objects in the wrong place, from boxes or masks, on transformers"
    in_sequence: ClassVar[bool] = True

    regions: Regions = ()
    until: float = param(1.0, "share of the run in which entities are seen", 0, 1)
    entity_tokens: int = param(64, "text tokens kept of each entity, at most all that the encoder gives", 1, 512)
    branches: tuple[str, ...] = field(default=("cond", "uncond"), kw_only=True)
    where: Where = field(default=Where(kinds=("joint",)), kw_only=True)

    @property
    def idle(self) -> bool:
        return self.window.empty or self.until == 0 or not any(self.regions)

    def conflict(self, other: Control) -> str | None:
        return both_in_sequence(self, other)

    def context(self, text: Text, sampling: Sampling) -> Text:
        check_whole(self)
        return with_entities(text, sampling, self.regions, self.entity_tokens)

    def begin(self, sampling: Sampling) -> Any:
        return Entities.begin(sampling, self.regions, self.where)

    def mask(self, call: Call, state: Entities) -> TokenGroups | None:
        if call.branch == "uncond" or call.step.progress >= self.until:
            return state.mask(call, hidden_groups)
        return state.mask(call, entity_groups)
