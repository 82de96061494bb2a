"""The prompt of a sampling, as ComfyUI hands its embeddings to the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from attnctrl.nodes.places import stacked
from attnctrl.nodes.plan import Plan
from attnctrl.prompt import PromptTokens


class Prompts:
    """What a plan knows of texts. decline: takes the reason why a conditioning is left alone."""

    def __init__(self, plan: Plan, decline: Callable[[str], None]) -> None:
        self.plan, self.words, self.decline = plan, plan.words, decline
        self._held: dict[Any, bool] = {}

    def tokenize(self, alone: list[str] | None = None) -> list[list[PromptTokens]]:
        """The tokens of the prompt, or of other texts: `Sampling.tokenize`."""
        assert self.words is not None
        return [[self.words.tokens]] if alone is None else [[self.words.read(text)] for text in alone]

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """The embeddings of the regions' texts and phrases, (texts, tokens, channels)."""
        known: dict[str, torch.Tensor] = {}
        for asked in self.plan.asked:
            known |= {} if asked.placed is None else asked.placed.texts
        return stacked([known[text] for text in texts])

    def room(self, text: int) -> int:
        """So many tokens that the words of the prompt have their places, also for a call with a shorter text alone."""
        return text if self.words is None else max(text, int(self.words.embeddings.shape[1]))

    def holds(self, context: Any, rows: slice, uuid: Any) -> bool:
        """Whether the text of some rows is the prompt whose words are known; True where no words are asked for.

        uuid: of the conditioning, for which the answer stays the same during a sampling.
        """
        if self.words is None:
            return True
        if uuid is None or uuid not in self._held:
            known, given = self.words.embeddings, context[rows]
            same = known.shape[-1] == given.shape[-1] and known.shape[1] <= given.shape[1]
            self._held[uuid] = same and bool((given[:, : known.shape[1]] == known[:1].to(given)).all())
            if not self._held[uuid]:
                self.decline("a positive conditioning is not the prompt whose words are connected: it is left alone")
        return self._held[uuid]

    def length(self, context: Any, rows: Sequence[slice], own: Sequence[bool]) -> tuple[int, bool]:
        """How many tokens the prompt has, and whether ComfyUI repeated them to the length of another text."""
        count = 0 if context is None else int(context.shape[1])
        known = 0 if self.words is None else int(self.words.embeddings.shape[1])
        first = next((r for r, mine in zip(rows, own, strict=True) if mine), None)
        if not 0 < known < count or count % known or first is None:
            return count, False
        parts = context[first].unflatten(1, (-1, known))
        repeated = bool((parts == parts[:, :1]).all())
        return (known if repeated else count), repeated
