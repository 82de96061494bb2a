"""Which attributes a prompt gives to which noun: by a rule that needs nothing installed, or by spaCy."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from attnctrl.errors import ControlError
from attnctrl.prompt import whole_words


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_OPENERS = _words(
    "a an the this that these those some any each every another both all no one two three four five six seven eight "
    "nine ten several many few my your his her its our their"
)
_JOINS = frozenset(("and", "or", "&", ","))
_SKIPPED = frozenset(("very", "quite", "rather", "so", "too"))
_BREAKS = _words(
    "on in at of with without within under over above below near beside besides behind by to from next into onto "
    "through between among across against around inside outside along toward towards for upon off up down as like than "
    "while where who which whose it he she they we i you there here not but then "
    "is are was were be been being am has have had does do did can sits stands lies runs holds wears eats rides looks "
    "plays jumps flies walks sleeps hangs rests contains shows sitting standing"
)
# Words in -ing that are nouns; others, behind a noun, begin what it is doing.
_NOUNS_ING = _words(
    "ring king wing thing string spring swing building painting drawing evening morning ceiling clothing wedding "
    "railing earring pudding icing stocking duckling darling"
)
_PLACES = _words("side top bottom middle center centre front left right corner foreground")
_MEDIA = _words("photo photograph picture image painting drawing illustration render rendering sketch")
_ALSO_NOUNS = frozenset(("orange", "gold", "silver", "rose", "olive", "lime", "peach"))
_ADJECTIVES = _ALSO_NOUNS | _words(
    "red green blue yellow purple pink cyan white gray grey black beige brown violet magenta turquoise teal golden "
    "small large big tiny huge tall short long wide young old new dark light bright pale round square-shaped striped "
    "spotted shiny wooden metallic plastic fluffy furry"
)
_TOKEN = re.compile(r"\w+(?:['\u2019-]\w+)*|[^\w\s]")


@dataclass(frozen=True)
class Word:
    """A word of a prompt; occurrence: which of its places there, 0 the first."""

    text: str
    occurrence: int = 0


@dataclass(frozen=True)
class NounPhrase:
    """A noun and the attributes that belong to it, in the order of the prompt."""

    noun: Word
    attributes: tuple[Word, ...] = ()

    @property
    def words(self) -> tuple[str, ...]:
        """Attributes, then the noun, as texts."""
        return (*(word.text for word in self.attributes), self.noun.text)


@dataclass
class _Chunk:
    """Words in a row with nothing between them that ends a noun phrase."""

    words: list[re.Match[str]]
    opened: bool
    joined: bool
    of: bool = False

    @property
    def last(self) -> str:
        return self.words[-1][0].lower()


def find_pairs(prompt: str, parser: str = "rules") -> list[NounPhrase]:
    """The nouns of `prompt` with their attributes, in its order.

    "a red circle and a blue star on a gray background" gives (red, circle), (blue, star), (gray, background).

    parser: "rules" takes the last of the words between articles, prepositions, conjunctions and punctuation for the
    noun and those before it for its attributes: right for plain noun phrases, as prompts mostly are; it knows few
    verbs and no attribute that follows its noun. "spacy" uses the first English spaCy model that is installed.

    Raises ControlError for other parsers, and for "spacy" where spaCy or its model is missing.
    """
    if parser == "rules":
        return list(_from_chunks(prompt, _chunks(prompt)))
    if parser == "spacy":
        return pairs_of_doc(_spacy_model()(prompt))
    raise ControlError(f'parser "{parser}" is unknown: choose one of rules, spacy.')


def _chunks(prompt: str) -> list[_Chunk]:
    chunks: list[_Chunk] = []
    words: list[re.Match[str]] = []
    # Whether the words under way stand behind an article, and whether a mere "and" or comma parts them from the last.
    opened = joined = False

    def close() -> bool:
        """End the words under way; whether there were any."""
        nonlocal words
        ended = bool(words)
        if ended:
            chunks.append(_Chunk(words, opened, joined))
        words = []
        return ended

    for token in _TOKEN.finditer(prompt):
        text = token[0].lower()
        if text in _SKIPPED:
            continue
        if text in _OPENERS or text.isdigit() or text.endswith(("'s", "\u2019s")):
            joined = not close() and joined
            opened = True
        elif text in _JOINS:
            close()
            opened, joined = False, True
        elif not text[0].isalnum() or text in _BREAKS or _is_doing(text, words):
            if close() and text == "of":
                chunks[-1].of = True
            opened = joined = False
        else:
            words.append(token)
    close()
    return chunks


def _is_doing(text: str, before: list[re.Match[str]]) -> bool:
    """Whether a word in -ing says what the noun before it does, rather than what the noun behind it is like."""
    doing = text.endswith("ing") and len(text) > 4 and text not in _NOUNS_ING
    return doing and bool(before) and before[-1][0].lower() not in _ADJECTIVES


def _from_chunks(prompt: str, chunks: list[_Chunk]) -> Iterator[NounPhrase]:
    pending: list[re.Match[str]] = []
    for chunk, following in zip(chunks, [*chunks[1:], None], strict=False):
        if chunk.last in _ADJECTIVES:
            if following is not None and following.joined and not following.opened:
                pending += chunk.words  # "a red and blue ball"
                continue
            if not chunk.opened or chunk.last not in _ALSO_NOUNS:
                pending = []  # "the wall is red"
                continue
        if chunk.last in _PLACES or (chunk.last in _MEDIA and chunk.of):
            pending = []
            continue
        *attributes, noun = (_word(prompt, m[0], m.start()) for m in (*pending, *chunk.words))
        pending = []
        yield NounPhrase(noun, tuple(attributes))


def _word(prompt: str, text: str, start: int) -> Word:
    return Word(text, sum(match.start() < start for match in whole_words(prompt, text)))


def pairs_of_doc(doc: Any) -> list[NounPhrase]:
    """The same from a document that a spaCy pipeline with a dependency parser made.

    Attributes are adjectival and nominal modifiers, what these are joined to, and predicates ("the wall is red").
    """
    found = []
    for token in doc:
        if token.pos_ not in ("NOUN", "PROPN") or token.dep_ == "compound":
            continue
        modifiers = [c for c in token.children if c.dep_ in ("amod", "compound", "nmod")]
        if token.dep_ in ("nsubj", "nsubjpass"):
            modifiers += [c for c in token.head.children if c.dep_ == "acomp"]
        modifiers = sorted(_joined(modifiers), key=lambda t: t.idx)
        noun, *attributes = (_word(doc.text, t.text, t.idx) for t in (token, *modifiers))
        found.append(NounPhrase(noun, tuple(attributes)))
    return found


def _joined(tokens: Iterable[Any]) -> Iterator[Any]:
    for token in tokens:
        yield token
        yield from _joined(c for c in token.children if c.dep_ == "conj")


@cache
def _spacy_model() -> Any:
    try:
        import spacy
    except ImportError:
        raise ControlError('spaCy is not installed: pip install spacy, or use parser="rules".') from None
    names = sorted(name for name in spacy.util.get_installed_models() if name.startswith("en_"))
    if not names:
        raise ControlError(
            'spaCy has no English model: python -m spacy download en_core_web_sm, or use parser="rules".'
        )
    return spacy.load(names[0])
