"""A prompt as ComfyUI's text encoders read it: where its words stand among the tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from attnctrl.errors import ControlError
from attnctrl.prompt import PromptTokens

SPECIAL = re.compile(r"<\|?[^<>|]+\|?>")
BESIDE = {frozenset({"l", "g"}): "g", frozenset({"l", "t5xxl"}): "t5xxl"}
"""Of models with two encoders, the one that counts: SDXL's stand side by side; FLUX sees no words of its CLIP."""


@dataclass(frozen=True, eq=False)
class Words:
    """A prompt, a ComfyUI CLIP object, and the conditioning that CLIPTextEncode would make of it.

    Raises ControlError for encoders whose tokens are laid out in another way than one text after another.
    """

    clip: Any
    text: str
    conditioning: Any
    tokens: PromptTokens

    @classmethod
    def of(cls, clip: Any, text: str) -> Words:
        pairs = clip.tokenize(text)
        return cls(clip, text, clip.encode_from_tokens_scheduled(pairs), tokens_of(clip, pairs))

    @cached_property
    def embeddings(self) -> torch.Tensor:
        """What the model's text tokens are made of, (1, tokens, channels)."""
        return self.conditioning[0][0]

    def read(self, text: str) -> PromptTokens:
        """The tokens of any other text."""
        return tokens_of(self.clip, self.clip.tokenize(text))

    def spelled(self, phrase: str) -> str:
        """A phrase as the encoder's tokens spell it: so a phrase and a prompt are compared."""
        return self.read(phrase).prompt.strip()

    def encode(self, text: str) -> torch.Tensor:
        """Any text as conditioning, (1, tokens, channels)."""
        found: torch.Tensor = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))[0][0]
        return found


def tokens_of(clip: Any, pairs: dict[str, list[list[tuple]]]) -> PromptTokens:
    """The tokens that `clip.tokenize` gave, with their places in the text that they spell.

    That text is lower case where the encoder's is, and without the marks of weights.
    """
    names = frozenset(pairs)
    key = next(iter(names)) if len(names) == 1 else BESIDE.get(names)
    if key is None:
        raise ControlError(
            f"words cannot be found in the tokens of the encoders {', '.join(sorted(names))}: known are single "
            "encoders, SDXL's two and FLUX's."
        )
    prompt, tokens, spans = "", [], []
    for piece in (_piece(clip, pair) for chunk in pairs[key] for pair in chunk):
        if not piece or SPECIAL.fullmatch(piece):
            tokens.append(piece)
            spans.append((0, 0))
            continue
        # CLIP marks the end of a word, SentencePiece its beginning.
        text = piece.removesuffix("</w>").replace("\u2581", " ")
        start = len(prompt) + len(text) - len(text.lstrip())
        prompt += text
        tokens.append(text.strip())
        spans.append((start, len(prompt)))
        prompt += " " * piece.endswith("</w>")
    last = max((i for i, (a, b) in enumerate(spans) if a < b), default=-1)
    # A long text becomes several chunks, and none is cut off: the limit is never reached.
    return PromptTokens(prompt, tuple(tokens), tuple(spans), len(spans) + 2, min(last + 1, len(spans)))


def _piece(clip: Any, pair: tuple) -> str:
    """The text of a token; empty for a textual inversion, which is a tensor."""
    if not isinstance(pair[0], int):
        return ""
    found: str = clip.tokenizer.untokenize([pair])[0][1]
    return found
