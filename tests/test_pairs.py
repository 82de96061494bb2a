"""Pairs tied to a prompt: which tokens, which group, for every picture."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnctrl as ac
from attnctrl.nouns import find_pairs
from attnctrl.pairs import Words, named, resolve_pairs, resolve_subjects
from attnctrl.subjects import contenders
from tests.methods import sampling

PROMPT = "a red cat and the bird"  # tokens 1 to 6


def listing(words: Words, picture: int = 0) -> list[tuple[list[int], int, bool]]:
    """(token positions, group, whether it is the noun) of every word."""
    rows = zip(words.tokens[picture], words.group[picture], words.noun[picture], strict=True)
    return [(t.nonzero().flatten().tolist(), int(g), bool(n)) for t, g, n in rows]


RED_CAT_AND_BIRD = [([2], 0, False), ([3], 0, True), ([6], 1, True)]


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"phrases": ("cat", "bird")},
        {"phrases": ("a red cat", "the bird")},
        {"pairs": (("red", "cat"), ("bird",))},
        {"pairs": ((("red", "cat"), ("bird",)),)},
        {"pairs": find_pairs(PROMPT)},
        {"phrases": ("dog",), "pairs": (("red", "cat"), ("bird",))},  # pairs come first
    ],
)
def test_every_way_of_saying_it(given: dict[str, Any]) -> None:
    assert listing(resolve_pairs(sampling(PROMPT), **given)) == RED_CAT_AND_BIRD


def test_the_place_is_where_the_words_stand_together() -> None:
    twice = "a cat and a red cat and a dog"  # cat: 2 and 6
    assert listing(resolve_pairs(sampling(twice), pairs=(("red", "cat"),))) == [([5], 0, False), ([6], 0, True)]
    assert listing(resolve_pairs(sampling(twice), pairs=(("cat",), ("red", "cat")))) == [
        ([2], 0, True),
        ([5], 1, False),
        ([6], 1, True),
    ]
    both = "a red dog and a red dog"
    two = [([2], 0, False), ([3], 0, True), ([6], 1, False), ([7], 1, True)]
    assert listing(resolve_pairs(sampling(both))) == two
    assert listing(resolve_pairs(sampling(both), pairs=(("red", "dog"), ("red", "dog")))) == two
    assert listing(resolve_pairs(sampling(both), phrases=("dog",))) == two  # one noun, both of its places
    assert listing(resolve_pairs(sampling("a red red"), pairs=(("red", "red"),))) == [([3], 0, False), ([2], 0, True)]


def test_a_phrase_without_one_noun_counts_as_a_whole() -> None:
    found = resolve_pairs(sampling(PROMPT), phrases=("cat and the bird", "the"))
    assert listing(found) == [([3, 4, 5, 6], 0, True), ([5], 1, True)]


def test_prompts_and_pictures() -> None:
    found = resolve_pairs(sampling([PROMPT, "a dog"], images=2))
    assert found.tokens.shape == (4, 3, 24)
    assert torch.equal(found.contenders, contenders(sampling([PROMPT, "a dog"], images=2)))
    assert listing(found, 1) == RED_CAT_AND_BIRD
    assert listing(found, 2) == listing(found, 3) == [([2], 0, True), ([], -1, False), ([], -1, False)]


def test_subjects_are_phrases_or_all_nouns() -> None:
    given = sampling([PROMPT, "a dog"])
    nouns = resolve_subjects(given, None)
    assert [row.nonzero().tolist() for row in nouns.tokens] == [[[0, 3], [1, 6]], [[0, 2]]]
    assert torch.equal(nouns.contenders, contenders(given))
    assert nouns.valid.tolist() == [[True, True], [True, False]]
    phrases = resolve_subjects(given, (("red cat",), ("dog",)))
    assert [row.nonzero().tolist() for row in phrases.tokens] == [[[0, 2], [0, 3]], [[0, 2]]]


def test_what_is_named() -> None:
    assert named(None, None)
    assert named(("cat",), None)
    assert named((), (("red", "cat"),))
    assert named(None, find_pairs(PROMPT))
    assert named((), find_pairs(PROMPT))
    for nothing in ((), ((),)):
        assert not named(nothing, None)
        assert not named(("cat",), nothing)


BAD: list[tuple[dict[str, Any], Any, str]] = [
    ({}, "a", r'no noun was found in the prompt "a": name what is meant with phrases='),
    ({"pairs": (("red", "dog"),)}, PROMPT, r'the phrase "dog" is not in the prompt'),
    ({"pairs": ("red", "cat")}, PROMPT, r'pairs hold single words: give a list of pairs such as \("red", "circle"\)'),
    ({"pairs": (("red", "cat"), (("bird",),))}, PROMPT, r"pairs mix single pairs and lists"),
    ({"pairs": ((("red", "cat"),), ())}, PROMPT, r"2 lists of pairs for 1 prompts"),
    ({"phrases": ("dog",)}, PROMPT, r'the phrase "dog" is not in the prompt'),
    ({"phrases": "cat"}, PROMPT, r'phrases is one string \("cat"\)'),
    ({"phrases": (("cat",), ("cat",))}, PROMPT, r"2 lists of phrases for 1 prompts"),
]


@pytest.mark.parametrize(("given", "prompt", "sentence"), BAD)
def test_bad_input(given: dict[str, Any], prompt: str, sentence: str) -> None:
    with pytest.raises(ac.ControlError, match=sentence):
        resolve_pairs(sampling(prompt), **given)


def test_embeddings_without_a_prompt() -> None:
    given = sampling(PROMPT)
    given.prompts = None
    with pytest.raises(ac.ControlError, match=r"prompt_embeds without a prompt: name it with control\(pipe"):
        resolve_pairs(given)
