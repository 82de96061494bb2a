"""Attributes and nouns of a prompt: the rule by examples and properties, spaCy by documents made by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import attnctrl as ac
from attnctrl import nouns
from attnctrl.nouns import NounPhrase, Word, find_pairs, pairs_of_doc
from attnctrl.prompt import whole_words
from attnctrl.shapes.captions import article, prompt_for
from attnctrl.shapes.world import BACKGROUNDS, COLOURS, SHAPES

EXAMPLES: dict[str, list[tuple[str, ...]]] = {
    "a red circle and a blue star on a gray background": [("red", "circle"), ("blue", "star"), ("gray", "background")],
    "photo of a large red ring next to small cross": [("large", "red", "ring"), ("small", "cross")],
    "a photo of a cat and dog": [("cat",), ("dog",)],
    "an orange and a banana": [("orange",), ("banana",)],
    "a red and blue ball": [("red", "blue", "ball")],
    "a green, small ring": [("green", "small", "ring")],
    "an orange and black cat sleeping on the old wooden chair": [
        ("orange", "black", "cat"),
        ("old", "wooden", "chair"),
    ],
    "A t-shirt, a shirt": [("t-shirt",), ("shirt",)],
    "a cat wearing a very bright red hat, in the top left corner": [("cat",), ("bright", "red", "hat")],
    "2 flying birds": [("flying", "birds")],
    "the man's hat": [("hat",)],
    "a bowl of fruit": [("bowl",), ("fruit",)],
    "the wall is red": [("wall",)],
    "": [],
    "a, and": [],
}


@pytest.mark.parametrize("prompt", EXAMPLES)
def test_examples(prompt: str) -> None:
    assert [pair.words for pair in find_pairs(prompt)] == EXAMPLES[prompt]


def test_repeated_words_are_told_apart() -> None:
    first, second = find_pairs("a red star and a red star")
    assert first == NounPhrase(Word("star", 0), (Word("red", 0),))
    assert second == NounPhrase(Word("star", 1), (Word("red", 1),))
    assert find_pairs("an orange orange")[0] == NounPhrase(Word("orange", 1), (Word("orange", 0),))
    assert find_pairs("a t-shirt, a shirt")[1].noun == Word("shirt", 1)  # as `PromptTokens.occurrences` counts


THINGS = st.tuples(st.sampled_from(SHAPES), st.sampled_from(COLOURS))


@given(st.lists(THINGS, min_size=1, max_size=5), st.sampled_from([*BACKGROUNDS, None]))
def test_prompts_of_the_shapes_world(things: list[tuple[str, str]], background: str | None) -> None:
    """Also with things that repeat: every pair stands where it was written."""
    prompt, phrases = prompt_for(things, background)
    found = find_pairs(prompt)
    expected = [(colour, shape) for shape, colour in things]
    assert [pair.words for pair in found] == expected + ([(background, "background")] if background else [])
    position = 0
    for pair, phrase in zip(found, phrases, strict=False):
        start = prompt.index(phrase, position)
        position = start + len(phrase)
        for word in (*pair.attributes, pair.noun):
            places = [match.start() for match in whole_words(prompt, word.text)]
            assert start <= places[word.occurrence] < position


WORDS = st.sampled_from(["fox", "lamp", "boat", "tree"])
LOOKS = st.sampled_from(["red", "tiny", "wooden", "ancient", "striped"])
JOINTS = st.sampled_from([" and ", ", ", " next to ", " on ", " with "])


@given(st.lists(st.tuples(st.lists(LOOKS, max_size=3, unique=True), WORDS, JOINTS), min_size=1, max_size=5))
def test_any_phrases_with_articles(parts: list[tuple[list[str], str, str]]) -> None:
    prompt, expected = "", []
    for looks, noun, joint in parts:
        words = " ".join([*looks, noun])
        prompt += (joint if prompt else "") + f"{article(words)} {words}"
        expected.append((*looks, noun))
    assert [pair.words for pair in find_pairs(prompt)] == expected


@given(st.text(max_size=80))
def test_any_text_gives_words_that_stand_in_it(prompt: str) -> None:
    for pair in find_pairs(prompt):
        for word in (*pair.attributes, pair.noun):
            assert word.occurrence < len(list(whole_words(prompt, word.text)))


@dataclass(eq=False)
class Token:
    """What of a spaCy token is read."""

    text: str
    pos_: str
    dep_: str
    idx: int
    head: Any = None
    children: list[Token] = field(default_factory=list)


class Doc(list):
    text = ""


def doc(*rows: tuple[str, str, str, int]) -> Doc:
    """Tokens as (text, part of speech, dependency, position of the head)."""
    made, start = Doc(), 0
    for text, pos, dep, _ in rows:
        made.append(Token(text, pos, dep, start))
        start += len(text) + 1
    made.text = " ".join(row[0] for row in rows)
    for token, (*_, head) in zip(made, rows, strict=True):
        token.head = made[head]
        if token.head is not token:
            token.head.children.append(token)
    return made


def test_a_document_of_spacy() -> None:
    parsed = doc(
        ("a", "DET", "det", 4),
        ("red", "ADJ", "amod", 4),
        ("and", "CCONJ", "cc", 1),
        ("blue", "ADJ", "conj", 1),
        ("ball", "NOUN", "nsubj", 5),
        ("is", "AUX", "ROOT", 5),
        ("shiny", "ADJ", "acomp", 5),
    )
    assert [pair.words for pair in pairs_of_doc(parsed)] == [("red", "blue", "shiny", "ball")]
    parsed = doc(("teddy", "NOUN", "compound", 1), ("bear", "NOUN", "ROOT", 1))
    assert [pair.words for pair in pairs_of_doc(parsed)] == [("teddy", "bear")]


def test_spacy_is_used_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = doc(("red", "ADJ", "amod", 1), ("ball", "NOUN", "ROOT", 1))
    monkeypatch.setattr(nouns, "_spacy_model", lambda: lambda prompt: parsed)
    assert [pair.words for pair in find_pairs("red ball", "spacy")] == [("red", "ball")]


def test_other_parsers_are_refused() -> None:
    with pytest.raises(ac.ControlError, match=r'parser "nltk" is unknown: choose one of rules, spacy'):
        find_pairs("a cat", "nltk")


def test_without_spacy_the_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "spacy", None)
    nouns._spacy_model.cache_clear()
    with pytest.raises(ac.ControlError, match=r'spaCy is not installed: pip install spacy, or use parser="rules"'):
        find_pairs("a cat", "spacy")
