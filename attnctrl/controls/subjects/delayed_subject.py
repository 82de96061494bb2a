"""FastComposer: the prompt's own words at first, for the layout; the subject's embeddings later, for its look."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from attnctrl.control import Control, Where, param
from attnctrl.errors import ControlError
from attnctrl.sampling import Sampling
from attnctrl.sites import Call


def personalised(text: torch.Tensor, places: tuple[int, ...], embedding: torch.Tensor) -> torch.Tensor:
    """The text (tokens, channels) with the last tokens of a phrase replaced by an embedding, (n, channels)."""
    changed = text.clone()
    changed[list(places[-len(embedding) :])] = embedding.to(text)
    return changed


def fitted(
    text: torch.Tensor, sampling: Sampling, prompt: int, phrase: str, embedding: torch.Tensor, who: str
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """The text (tokens, channels) of a prompt with an embedding in the place of a phrase's last tokens, and which.

    Raises ControlError for phrases that are not in the prompt, and embeddings that do not fit.
    """
    places = sampling.find(phrase, prompt)
    given = embedding[None] if embedding.ndim == 1 else embedding
    if given.ndim != 2 or given.shape[1] != text.shape[1] or not 1 <= len(given) <= len(places):
        raise ControlError(
            f'{who} has an embedding of shape {tuple(embedding.shape)} for "{phrase}", which is {len(places)} tokens '
            f"of {text.shape[1]} channels: give at most so many."
        )
    return personalised(text, places, given), places[-len(given) :]


@dataclass(frozen=True)
class DelayedSubject(Control):
    """Delayed subject conditioning of FastComposer (Xiao et al., arXiv 2305.10431, sec. 4.3), for any embeddings.

    embeddings: for phrases of the prompt what takes the place of their last token, (channels,), or of their last n
    tokens, (n, channels), as the denoiser gets them: an image encoder's, a learned word's (`attnctrl.words`). Only
    the first prompt must hold them all. Until `delay` of the run the text is the prompt's own, afterwards it has these.
    The paper recommends a delay of 0.2 to 0.4; its script's "i <= 10" of 50 steps, the default, leaves 11 steps to the
    prompt. The unconditional branch stays as it is.
    Families: UNets, PixArt and others with cross-attention.
    """

    paper: ClassVar[str] = "arXiv 2305.10431"
    fixes: ClassVar[str] = "an embedded subject that decides the whole layout"
    needs_rows: ClassVar[bool] = False

    where: Where = field(default=Where(kinds=("cross",)), kw_only=True)
    embeddings: Mapping[str, torch.Tensor] = field(default_factory=dict, compare=False)
    delay: float = param(0.22, "part of the run with the prompt's own words", 0, 1)

    @property
    def idle(self) -> bool:
        return self.window.empty or not self.embeddings or self.delay == 1

    def begin(self, sampling: Sampling) -> torch.Tensor:
        texts = []
        for p, text in enumerate(sampling.encode(list(sampling.prompts or [])).positive):
            for phrase, embedding in self.embeddings.items():
                # A picture of a set, or a reference, need not show every subject; some prompt must name it.
                if p and not any(tokens.occurrences(phrase) for tokens in sampling.tokens[p]):
                    continue
                text, _ = fitted(text, sampling, p, phrase, embedding, self.name)
            texts.append(text)
        stacked = torch.stack(texts).to(sampling.device, sampling.dtype)
        return stacked.repeat_interleave(sampling.images_per_prompt, dim=0)

    def inputs(self, call: Call, state: torch.Tensor) -> Call:
        if call.step.progress < self.delay:
            return call
        assert call.project is not None
        key, value = call.project(state)
        return call.change(key=key, value=value)
