"""Recording the maps of phrases while the pipeline runs, without touching its output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from attnctrl.control import Control
from attnctrl.errors import ControlError
from attnctrl.kernels import TokenGroups
from attnctrl.layout import phrases_of
from attnctrl.maps import Maps
from attnctrl.sampling import RECORD_WHERE
from attnctrl.sites import Call
from attnctrl.stepmaps import phrase_maps
from attnctrl.subjects import flat

if TYPE_CHECKING:
    from attnctrl.sampling import Sampling


class Recorder:
    """Observes the sites called `names` and keeps the mean map of each phrase."""

    def __init__(self, maps: Maps, names: frozenset[str]) -> None:
        self.maps, self.names = maps, names

    @classmethod
    def make(
        cls, sampling: Sampling, controls: Sequence[Control], record: bool | Sequence[str], foreign: Mapping[str, str]
    ) -> Recorder | None:
        """A recorder for the phrases that were asked for, None when there are none.

        Phrases named in `record` must stand in a prompt (ControlError); those that come from the controls are left
        out where they do not, because some methods encode regions on their own. foreign: the names of the layers
        with a processor of somebody else, and its type.
        """
        if record is False:
            return None
        asked = [] if record is True else [record] if isinstance(record, str) else list(record)
        if sampling.prompts is None and asked:
            sampling.find(asked[0])  # raises: there is no prompt to find it in
        wanted = dict.fromkeys([*asked, *(p for c in controls for p in named_phrases(c))])
        found: dict[str, torch.Tensor] = {}
        for phrase in wanted if sampling.prompts is not None else ():
            rows = torch.zeros(sampling.prompt_count, sampling.text_tokens, dtype=torch.bool)
            for p in range(sampling.prompt_count):
                if any(tokens.occurrences(phrase) for tokens in sampling.tokens[p]):
                    rows[p, list(sampling.find(phrase, p))] = True
            if rows.any():
                found[phrase] = rows
            elif phrase in asked:
                raise ControlError(_missing(sampling, phrase))
        if not found:
            return None
        tokens = torch.stack(list(found.values()), dim=1).to(sampling.device)
        sampling.maps = Maps(tuple(found), tokens.repeat_interleave(sampling.images_per_prompt, dim=0))
        sites = [s for s in sampling.sites if s.name not in foreign]
        names = frozenset(s.name for s in RECORD_WHERE.select(sites, sampling.latent_grid))
        if asked and not names:
            taken = ", ".join(sorted(set(foreign.values()))) or "nothing"
            raise ControlError(
                f'maps of "{asked[0]}" cannot be recorded: no layer has cross-attention that we know ({taken} took '
                "over)."
            )
        return cls(sampling.maps, names)

    def __call__(self, call: Call, probs: torch.Tensor | None, mask: torch.Tensor | TokenGroups | None) -> None:
        assert probs is not None
        assert self.maps.tokens is not None
        assert call.queries.grid is not None
        maps = phrase_maps(probs.mean(dim=1), self.maps.tokens)
        self.maps.add(call.step.index, call.site.name, maps, call.queries.grid)


def wants_record(controls: Sequence[Control], record: bool | Sequence[str]) -> bool:
    """Whether any phrase is to be recorded."""
    return bool(record) and (record is not True or any(named_phrases(c) for c in controls))


def named_phrases(control: Control) -> list[str]:
    """The phrases that a control's regions or phrases name."""
    return [*phrases_of(getattr(control, "regions", ())), *flat(getattr(control, "phrases", None) or ())]


def _missing(sampling: Sampling, phrase: str) -> str:
    listing = " / ".join(tokens[0].listing() for tokens in sampling.tokens)
    return f'the phrase "{phrase}" is not in the prompt, so its maps cannot be recorded; the tokens are {listing}.'
