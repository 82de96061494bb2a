"""Phrases tied to one sampling, for methods that take no regions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from attnctrl.errors import ControlError

if TYPE_CHECKING:
    from attnctrl.sampling import Sampling

Phrases = Sequence[str] | Sequence[Sequence[str]]
"""One list for every prompt, or one list per prompt."""


@dataclass(frozen=True)
class Subjects:
    """tokens: (batch, phrases, text tokens) bool, those of each phrase; prompts with fewer have empty rows.

    contenders: (batch, text tokens) bool, the tokens that compete in shares of words.
    """

    tokens: torch.Tensor
    contenders: torch.Tensor

    @property
    def valid(self) -> torch.Tensor:
        """(batch, phrases) bool, False for empty rows."""
        return self.tokens.any(dim=-1)


def contenders(sampling: Sampling) -> torch.Tensor:
    """(batch, text tokens) bool: see `PromptTokens.contenders`; the union where encoders share places."""
    rows = torch.zeros(sampling.prompt_count, sampling.text_tokens, dtype=torch.bool)
    for p, encoders in enumerate(sampling.tokens):
        for one in encoders:
            stop = min((other.offset for other in encoders if other.offset > one.offset), default=rows.shape[1])
            rows[p, list(one.contenders(stop))] = True
    return rows.to(sampling.device).repeat_interleave(sampling.images_per_prompt, dim=0)


def flat(phrases: Phrases) -> list[str]:
    """Every phrase, in order, once each."""
    return list(dict.fromkeys(p for item in phrases for p in ([item] if isinstance(item, str) else item)))


def phrase_lists(sampling: Sampling, phrases: Phrases) -> list[list[str]]:
    """One list per prompt. Raises ControlError when the lists do not match the prompts."""
    if isinstance(phrases, str):
        raise ControlError(f'phrases is one string ("{phrases}"): give a list of phrases.')
    shared = [p for p in phrases if isinstance(p, str)]
    lists = [[*p] for p in phrases if not isinstance(p, str)]
    if shared and lists:
        raise ControlError("phrases mix single phrases and lists: give one list, or one list per prompt.")
    if shared:
        lists = [shared] * sampling.prompt_count
    if len(lists) != sampling.prompt_count:
        raise ControlError(
            f"there are {len(lists)} lists of phrases for {sampling.prompt_count} prompts: give one list for all, or "
            "one per prompt."
        )
    return lists


def resolve_phrases(sampling: Sampling, phrases: Phrases) -> Subjects:
    """Tie the phrases to the prompts of a sampling.

    Raises ControlError when a phrase is not in its prompt or the lists do not match the prompts.
    """
    lists = phrase_lists(sampling, phrases)
    rows = torch.zeros(len(lists), max(map(len, lists)), sampling.text_tokens, dtype=torch.bool)
    for p, names in enumerate(lists):
        for i, phrase in enumerate(names):
            rows[p, i, list(sampling.find(phrase, p))] = True
    tokens = rows.to(sampling.device).repeat_interleave(sampling.images_per_prompt, dim=0)
    return Subjects(tokens, contenders(sampling))
