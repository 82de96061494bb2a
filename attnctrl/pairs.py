"""Attributes and nouns tied to one sampling, for methods that bind one to the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from attnctrl.errors import ControlError
from attnctrl.nouns import NounPhrase, Word, find_pairs
from attnctrl.prompt import PromptTokens
from attnctrl.subjects import Phrases, Subjects, contenders, phrase_lists, resolve_phrases

if TYPE_CHECKING:
    from attnctrl.sampling import Sampling

Pair = NounPhrase | Sequence[str]
"""Words of the prompt, attributes first and the noun last, or what `find_pairs` returns."""

Pairs = Sequence[Pair] | Sequence[Sequence[Pair]]
"""One list for every prompt, or one list per prompt."""


@dataclass(frozen=True)
class Words(Subjects):
    """The words of all pairs as subjects; prompts with fewer words are padded.

    group: (batch, words) number of the pair, -1 for padding. noun: (batch, words) bool, one per pair.
    """

    group: torch.Tensor
    noun: torch.Tensor

    @property
    def bound(self) -> torch.Tensor:
        """(batch, words, words) bool: the first is a noun and the second an attribute of the same pair."""
        return self.noun[:, :, None] & ~self.noun[:, None] & (self.group[:, :, None] == self.group[:, None])


def named(phrases: Phrases | None, pairs: Pairs | None) -> bool:
    """Whether there is anything to act on: None stands for what the prompt says, empty lists for nothing."""
    given = pairs if pairs is not None else phrases
    return given is None or any(isinstance(one, NounPhrase) or len(one) > 0 for one in given)


def resolve_subjects(sampling: Sampling, phrases: Phrases | None) -> Subjects:
    """The phrases tied to the prompts; None: every noun of the prompt.

    Raises ControlError as `resolve_phrases` does, and when a prompt has no noun.
    """
    if phrases is not None:
        return resolve_phrases(sampling, phrases)
    words = resolve_pairs(sampling)
    nouns = [tokens[noun] for tokens, noun in zip(words.tokens, words.noun, strict=True)]
    return Subjects(torch.nn.utils.rnn.pad_sequence(nouns, batch_first=True), words.contenders)


def resolve_pairs(sampling: Sampling, phrases: Phrases | None = None, pairs: Pairs | None = None) -> Words:
    """Which tokens belong to which pair.

    pairs, where given, say it. Otherwise each of `phrases` is a pair: with attributes of its own ("a red circle"), or
    a noun that takes those which the prompt gives it; one without a noun of its own, or with several, counts as a
    whole. Without either, the prompt's own pairs are taken.

    Raises ControlError when a word is not in its prompt, when lists do not match the prompts, and when a prompt in
    which nouns are to be found has none.
    """
    if pairs is not None:
        lists = [_placed(sampling, p, one) for p, one in enumerate(_pair_lists(sampling, pairs))]
    elif phrases is not None:
        lists = [_of_phrases(sampling, p, one) for p, one in enumerate(phrase_lists(sampling, phrases))]
    else:
        lists = [_of_prompt(sampling, p) for p in range(sampling.prompt_count)]
    longest = max((sum(len(pair.words) for pair in one) for one in lists), default=0)
    tokens = torch.zeros(len(lists), longest, sampling.text_tokens, dtype=torch.bool)
    group = torch.full((len(lists), longest), -1)
    noun = torch.zeros(len(lists), longest, dtype=torch.bool)
    for p, found in enumerate(lists):
        words = [(g, word, word is pair.noun) for g, pair in enumerate(found) for word in (*pair.attributes, pair.noun)]
        for w, (g, word, is_noun) in enumerate(words):
            tokens[p, w, list(sampling.find(word.text, p, word.occurrence))] = True
            group[p, w], noun[p, w] = g, is_noun
    tokens, group, noun = (
        t.to(sampling.device).repeat_interleave(sampling.images_per_prompt, dim=0) for t in (tokens, group, noun)
    )
    return Words(tokens, contenders(sampling), group, noun)


def _prompt(sampling: Sampling, p: int) -> PromptTokens:
    if sampling.prompts is None:
        raise ControlError(
            "the nouns of the prompt cannot be found, because the pipeline was given prompt_embeds without a prompt: "
            "name it with control(pipe, ..., prompt=...)."
        )
    return sampling.tokens[p][0]


def _of_prompt(sampling: Sampling, p: int) -> list[NounPhrase]:
    prompt = _prompt(sampling, p).prompt
    found = find_pairs(prompt)
    if not found:
        raise ControlError(f'no noun was found in the prompt "{prompt}": name what is meant with phrases=[...].')
    return found


def _of_phrases(sampling: Sampling, p: int, phrases: Iterable[str]) -> list[NounPhrase]:
    found: list[NounPhrase] = []
    for phrase in phrases:
        sampling.find(phrase, p)
        own = find_pairs(phrase)
        words = own[0].words if len(own) == 1 else (phrase,)
        meant = [pair for pair in find_pairs(_prompt(sampling, p).prompt) if pair.noun.text.lower() == words[0].lower()]
        found += meant if len(words) == 1 and meant else _placed(sampling, p, [words])
    return found


def _pair_lists(sampling: Sampling, pairs: Pairs) -> list[list[Pair]]:
    def single(item: Pair | Sequence[Pair]) -> bool:
        return isinstance(item, NounPhrase) or (len(item) > 0 and all(isinstance(word, str) for word in item))

    if isinstance(pairs, str) or any(isinstance(item, str) for item in pairs):
        raise ControlError('pairs hold single words: give a list of pairs such as ("red", "circle").')
    shared = [item for item in pairs if single(item)]
    lists = [[*item] for item in pairs if not single(item)]  # type: ignore[misc]
    if shared and lists:
        raise ControlError("pairs mix single pairs and lists: give one list, or one list per prompt.")
    if shared:
        lists = [shared] * sampling.prompt_count
    if len(lists) != sampling.prompt_count:
        raise ControlError(
            f"there are {len(lists)} lists of pairs for {sampling.prompt_count} prompts: give one list for all, or "
            "one per prompt."
        )
    return lists


def _placed(sampling: Sampling, p: int, pairs: Iterable[Pair]) -> list[NounPhrase]:
    """Each pair where its words stand closest together in the prompt, pairs with the same noun at different places."""
    found: list[NounPhrase] = []
    taken: set[int] = set()
    for pair in pairs:
        if isinstance(pair, NounPhrase):
            found.append(pair)
            continue
        for word in pair:
            sampling.find(word, p)  # raises where it is not in the prompt
        *attributes, noun = ([place[0] for place in _prompt(sampling, p).occurrences(word)] for word in pair)
        free = [at for at in noun if at not in taken] or noun
        chosen = min(free, key=lambda at: sum(min(_distances(at, places)) for places in attributes))
        taken.add(chosen)
        nearest = [_distances(chosen, places) for places in attributes]
        words = [Word(text, d.index(min(d))) for text, d in zip(pair[:-1], nearest, strict=True)]
        found.append(NounPhrase(Word(pair[-1], noun.index(chosen)), tuple(words)))
    return found


def _distances(noun: int, places: Sequence[int]) -> list[float]:
    # One place cannot be both the attribute and the noun: "an orange orange".
    return [abs(noun - at) if at != noun else float("inf") for at in places]
