"""From phrases to token positions, by the tokenizer's own offsets."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from attnctrl.errors import ControlError


@dataclass(frozen=True)
class Reader:
    """How a pipeline turns one of its prompts into text tokens of the denoiser.

    argument: the prompt's name in `encode_prompt`; where it is None, "prompt" counts. limit: how many tokens the
    encoder takes, None for the tokenizer's own limit. offset: where its first token stands among the denoiser's
    text tokens. template, drop: what the prompt is put into, and how many of the first tokens are cut off again.
    clean: what the pipeline does to the prompt before. special: whether special tokens are added. left: whether the
    pipeline pads to the limit on the left.
    """

    tokenizer: Any
    argument: str = "prompt"
    limit: int | None = None
    offset: int = 0
    template: str = "{}"
    drop: int = 0
    clean: Callable[[str], str] | None = None
    special: bool = True
    left: bool = False

    def read(self, prompt: str) -> PromptTokens:
        """Tokenize `prompt` as the pipelines do, without truncating. Raises ControlError for slow tokenizers."""
        if not getattr(self.tokenizer, "is_fast", False):
            raise ControlError(
                f"{type(self.tokenizer).__name__} gives no character offsets, so phrases cannot be found in the "
                "prompt: load its fast form (transformers 5 does so by default)."
            )
        prompt = prompt if self.clean is None else self.clean(prompt)
        # Not str.format: a chat template may hold braces of its own.
        encoded = self.tokenizer(
            self.template.replace("{}", prompt, 1),
            return_offsets_mapping=True,
            truncation=False,
            add_special_tokens=self.special,
        )
        ids = encoded["input_ids"][self.drop :]
        tokens = tuple(t.replace("</w>", "") for t in self.tokenizer.convert_ids_to_tokens(ids))
        start = self.template.index("{}")
        places = [(a - start, b - start) for a, b in encoded["offset_mapping"][self.drop :]]
        spans = tuple(_within(a, b, len(prompt)) for a, b in places)
        # Where a template goes on after the prompt, its first token there is what ends the text.
        end = next((i for i, (a, b) in enumerate(places) if b > a >= len(prompt)), len(ids) - 1)
        limit = int(self.limit or self.tokenizer.model_max_length)
        offset = self.offset + (limit - min(len(ids), limit) if self.left else 0)
        return PromptTokens(prompt, tokens, spans, limit, min(end, limit - 1), offset)


def _within(start: int, end: int, length: int) -> tuple[int, int]:
    """Characters of the prompt only: a token of the template around it has none, and some hold the space before it."""
    inside = start < end and end > 0 and start < length
    return (max(int(start), 0), min(int(end), length)) if inside else (0, 0)


@dataclass(frozen=True)
class PromptTokens:
    """One prompt as one tokenizer sees it.

    spans: for each position of the encoder's output, the (start, end) characters of the prompt, (0, 0) for special
    tokens. tokens: their texts. limit: how many positions the encoder has. end: position of the end-of-text token.
    offset: where position 0 stands among the denoiser's text tokens, which is what `occurrences` and `find` count.
    """

    prompt: str
    tokens: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    limit: int
    end: int
    offset: int = 0

    @property
    def start(self) -> int | None:
        """Where the first token stands among the denoiser's text tokens, None where it is a word.

        CLIP's start token, a language model's first mark: much attention goes there, to nothing in particular.
        """
        first = self.spans[0] if self.spans else (0, 1)
        return None if first[0] < first[1] else self.offset

    def contenders(self, stop: int) -> range:
        """Places of the tokens whose maps compete in shares of words, among the denoiser's text tokens.

        stop: where this encoder's tokens end. With one start token, as CLIP has, all but that and the last position,
        as published for CLIP, whose padding was trained. Else the first word to the end-of-text token: neither a
        chat's opening nor padding.
        """
        first = next((i for i, (a, b) in enumerate(self.spans) if a < b), 0)
        if first == 1:
            return range(self.offset + 1, stop - 1)
        return range(self.offset + first, min(self.offset + self.end + 1, stop))

    def occurrences(self, phrase: str) -> list[tuple[int, ...]]:
        """Token positions of each place where `phrase` stands in the prompt as whole words, ignoring case."""
        if not phrase.split():
            raise ControlError("a phrase is empty: name the words of the prompt that the region belongs to.")
        found = []
        for match in whole_words(self.prompt, phrase):
            inside = [i for i, (a, b) in enumerate(self.spans) if a < match.end() and b > match.start() and a < b]
            if inside:
                found.append(tuple(i + self.offset for i in inside))
        return found

    def find(self, phrase: str, occurrence: int | None = None) -> tuple[int, ...]:
        """Positions of the tokens of `phrase`.

        occurrence picks one of several places (0 is the first); None takes them all.
        Raises ControlError when the phrase is not in the prompt or reaches beyond the encoder's window.
        """
        places = self.occurrences(phrase)
        if not places:
            raise ControlError(
                f'the phrase "{phrase}" is not in the prompt "{self.prompt}": use words that stand there in this '
                f"order; its tokens are {self.listing()}."
            )
        if occurrence is not None:
            if not 0 <= occurrence < len(places):
                raise ControlError(
                    f'occurrence {occurrence} of "{phrase}" does not exist: it stands {len(places)} times in the '
                    f'prompt "{self.prompt}", counted from 0.'
                )
            places = [places[occurrence]]
        positions = tuple(sorted({i for place in places for i in place}))
        # The last position always belongs to the end-of-text token.
        last = positions[-1] - self.offset
        if last >= self.limit - 1:
            raise ControlError(
                f'the phrase "{phrase}" ends at token {last}, beyond the text encoder\'s window of '
                f"{self.limit} tokens: shorten the prompt or move the phrase forward."
            )
        return positions

    def reaches(self, phrase: str) -> bool:
        """Whether every place of `phrase` lies within the encoder's window."""
        return all(place[-1] - self.offset < self.limit - 1 for place in self.occurrences(phrase))

    def listing(self) -> str:
        """The prompt's own tokens, without the special ones, for messages."""
        return ", ".join(
            f"{i}:{token}" for i, (token, (a, b)) in enumerate(zip(self.tokens, self.spans, strict=True)) if a < b
        )


def whole_words(prompt: str, phrase: str) -> Iterator[re.Match[str]]:
    """Every place of `phrase` in `prompt` as whole words, ignoring case."""
    pattern = r"(?<!\w)" + r"\s+".join(re.escape(word) for word in phrase.split()) + r"(?!\w)"
    return re.finditer(pattern, prompt, flags=re.IGNORECASE)


def find_everywhere(prompts: list[PromptTokens], phrase: str, occurrence: int | None = None) -> tuple[int, ...]:
    """Positions of `phrase` for models with several text encoders (SDXL, SD3): their union.

    A phrase must stand in the first prompt; a different second prompt (`prompt_2`) may lack it. An encoder whose
    window ends before the phrase (CLIP beside T5) is left out, unless all of them end before it.
    """
    first, *others = prompts
    holders = [first, *(other for other in others if other.occurrences(phrase))]
    reached = [one for one in holders if first.occurrences(phrase) and one.reaches(phrase)]
    return tuple(sorted({i for one in reached or holders for i in one.find(phrase, occurrence)}))
