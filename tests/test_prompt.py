"""From phrases to tokens: by hand and by property."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import attnctrl as ac
from attnctrl.prompt import PromptTokens, Reader, find_everywhere
from tests import tiny
from tests.parts import qwen_tokenizer, t5_tokenizer
from tests.videos import llama_tokenizer

# Words that are one token to the tiny tokenizer, and words that it spells.
KNOWN = ("a", "cat", "dog", "red", "bird", "the", "and")
SPELLED = ("ox", "Zebra", "x1", "T-rex", "naïve", "cats", "reddish")


def read(prompt: str) -> PromptTokens:
    return Reader(tiny.tokenizer()).read(prompt)


def test_positions_count_the_start_token() -> None:
    tokens = read("a cat and a dog")
    assert tokens.tokens[1:6] == ("a", "cat", "and", "a", "dog")
    assert tokens.find("cat") == (2,)
    assert tokens.find("a dog") == (4, 5)
    assert tokens.find("a cat and a dog") == (1, 2, 3, 4, 5)
    assert tokens.end == 6


def test_a_word_of_several_tokens() -> None:
    tokens = read("a red ox and a cat")
    assert tokens.find("ox") == (3, 4)
    assert tokens.find("red ox") == (2, 3, 4)
    assert tokens.find("cat") == (7,)


@pytest.mark.parametrize("phrase", ["Red  Cat", "red cat", "RED CAT", " red cat ", "red\tcat"])
@pytest.mark.parametrize("prompt", ["the red cat", "The  RED   cat", "the red\ncat"])
def test_case_and_spaces_do_not_matter(prompt: str, phrase: str) -> None:
    assert read(prompt).find(phrase) == (2, 3)


@pytest.mark.parametrize("prompt", ["a cat, and a dog.", "(a cat) and (a dog)", "a cat; 'a dog'", '"a cat" + "a dog"'])
def test_punctuation_beside_a_phrase_does_not_belong_to_it(prompt: str) -> None:
    tokens = read(prompt)
    for phrase in ("a cat", "a dog"):
        assert [tokens.tokens[i] for i in tokens.find(phrase)] == phrase.split()


def test_a_phrase_is_whole_words() -> None:
    tokens = read("a category of cats, cat")
    (place,) = tokens.occurrences("cat")
    assert tokens.tokens[place[0]] == "cat"
    assert place[0] == tokens.end - 1


def test_repeated_phrases() -> None:
    tokens = read("a cat and a cat and a dog")
    assert tokens.find("cat") == (2, 5)
    assert tokens.find("cat", 0) == (2,)
    assert tokens.find("cat", 1) == (5,)
    for occurrence in (2, -1):
        with pytest.raises(ac.ControlError, match=rf"occurrence {occurrence} of \"cat\" does not exist: it stands 2 t"):
            tokens.find("cat", occurrence)


def test_a_phrase_that_is_not_there_shows_the_tokens() -> None:
    with pytest.raises(ac.ControlError, match=r'"a horse" is not in the prompt "a cat and a dog".*1:a, 2:cat.*5:dog'):
        read("a cat and a dog").find("a horse")
    with pytest.raises(ac.ControlError, match="not in the prompt"):
        read("a cat and a dog").find("dog a")
    with pytest.raises(ac.ControlError, match="a phrase is empty"):
        read("a cat").find("  ")


def test_a_phrase_beyond_the_window() -> None:
    """24 positions: the start token, 22 of the prompt, the end token."""
    fits = read("a " * 21 + "cat")
    assert fits.find("cat") == (22,)
    assert fits.end == 23
    beyond = read("a " * 22 + "cat")
    with pytest.raises(ac.ControlError, match=r'"cat" ends at token 23, beyond the text encoder\'s window of 24'):
        beyond.find("cat")
    assert beyond.find("a", 3) == (4,)  # what lies inside is still found
    assert beyond.end == 23
    with pytest.raises(ac.ControlError, match="beyond the text encoder's window"):
        read("cat " + "a " * 30).find("cat " + "a " * 30)


def test_several_encoders() -> None:
    first, second, other = read("a cat and a dog"), read("the red cat"), read("a bird")
    assert find_everywhere([first, second], "cat") == (2, 3)
    assert find_everywhere([first, other], "cat") == (2,)
    with pytest.raises(ac.ControlError, match="not in the prompt"):
        find_everywhere([other, first], "cat")


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ac.ControlError, match=r"Slow gives no character offsets.*load its fast form"):
        Reader(Slow()).read("a cat")


@st.composite
def prompts(draw: Any) -> tuple[list[str], int, int, str]:
    """Words, the first and last word of a phrase, and the prompt with random spaces between the words."""
    words = draw(st.lists(st.sampled_from(KNOWN + SPELLED), min_size=1, max_size=6))
    first = draw(st.integers(0, len(words) - 1))
    last = draw(st.integers(first, len(words) - 1))
    spaces = [draw(st.sampled_from([" ", "  ", "\n", " \t "])) for _ in words]
    return words, first, last, "".join(w + s for w, s in zip(words, spaces, strict=True))


@given(prompts(), st.randoms(use_true_random=False))
def test_the_tokens_of_a_phrase_are_those_whose_offsets_lie_in_it(
    made: tuple[list[str], int, int, str], rng: random.Random
) -> None:
    words, first, last, prompt = made
    tokens = Reader(tiny.tokenizer()).read(prompt)
    phrase = " ".join(w.upper() if rng.random() < 0.3 else w for w in words[first : last + 1])
    # Where the phrase stands, by counting characters: an oracle that knows no regular expressions.
    starts, at = [], 0
    for word in words:
        at = prompt.index(word, at)
        starts.append(at)
        at += len(word)
    length = last - first + 1
    wanted = [w.lower() for w in words[first : last + 1]]
    places = []
    end_of_last = -1
    for i in range(len(words) - length + 1):
        if [w.lower() for w in words[i : i + length]] == wanted and starts[i] > end_of_last:
            start, end = starts[i], starts[i + length - 1] + len(words[i + length - 1])
            places.append(tuple(k for k, (a, b) in enumerate(tokens.spans) if a < b and a < end and b > start))
            end_of_last = end - 1
    assert len(tokens.tokens) <= tokens.limit * 3
    everything = tuple(sorted({k for place in places for k in place}))
    if everything[-1] >= tokens.limit - 1:
        with pytest.raises(ac.ControlError, match="beyond the text encoder's window"):
            tokens.find(phrase)
        return
    assert tokens.find(phrase) == everything
    for i, place in enumerate(places):
        assert tokens.find(phrase, i) == place
    # Spelled out, the tokens give the phrase back, and no token of a neighbouring word is among them.
    spelled = "".join(tokens.tokens[k] for k in places[0])
    assert _letters(spelled) == _letters("".join(wanted))


def _letters(text: str) -> str:
    """The ASCII letters and digits; the byte-level tokens of other characters are not text."""
    return "".join(c for c in text.lower() if c.isascii() and c.isalnum())


@given(st.lists(st.sampled_from(KNOWN + SPELLED), min_size=1, max_size=4), st.sampled_from(["horse", "ca", "og", "b"]))
def test_a_phrase_that_is_not_a_word_of_the_prompt_is_refused(words: list[str], phrase: str) -> None:
    with pytest.raises(ac.ControlError, match="is not in the prompt"):
        read(" ".join(words)).find(phrase)


def test_a_phrase_beyond_one_window_is_found_by_the_wider_encoder() -> None:
    """SD3 reads a prompt with CLIP and, behind its tokens, with T5, which takes in more of it."""
    narrow = Reader(tiny.tokenizer(), limit=5).read(tiny.PROMPT)
    wide = Reader(t5_tokenizer(), limit=12, offset=5).read(tiny.PROMPT)
    assert find_everywhere([narrow, wide], "cat") == (2, 6)
    assert find_everywhere([narrow, wide], "dog") == (9,)
    with pytest.raises(ac.ControlError, match="beyond the text encoder's window"):
        find_everywhere([narrow, narrow], "dog")
    with pytest.raises(ac.ControlError, match="is not in the prompt"):
        find_everywhere([narrow, wide], "bird")


def test_the_tokens_that_compete_in_shares_of_words() -> None:
    """CLIP: all but the start token and the last position; T5, which has no start token: the words and their end."""
    clip, t5 = Reader(tiny.tokenizer()).read("a cat and a dog"), Reader(t5_tokenizer(), limit=12).read("a cat")
    assert (clip.start, clip.contenders(24)) == (0, range(1, 23))
    words = [i for i, (a, b) in enumerate(t5.spans) if a < b]
    assert t5.start is None
    assert list(t5.contenders(12)) == [*words, words[-1] + 1]
    behind = Reader(t5_tokenizer(), limit=12, offset=24).read("a cat")
    assert list(behind.contenders(36)) == [24 + i for i in t5.contenders(12)]


def test_a_chat_before_the_prompt_does_not_compete() -> None:
    """Without its last token, nor what follows the end-of-text token; cut off by the pipeline, there is no start."""
    chat = "<|im_start|>a bird<|im_end|>{}<|im_end|>a red"
    whole = Reader(qwen_tokenizer(), template=chat, limit=60).read("a cat")
    first, end = whole.find("a cat")[0], whole.end
    assert (whole.start, whole.contenders(60)) == (0, range(first, end + 1))
    cut = Reader(qwen_tokenizer(), template=chat, limit=60, drop=first).read("a cat")
    assert (cut.start, cut.contenders(60)) == (None, range(end - first + 1))


def test_a_token_that_holds_the_space_before_the_prompt_belongs_to_it() -> None:
    """Llama's word tokens begin with the space: behind a template, the first word would else be lost."""
    tokens = Reader(llama_tokenizer(), template="a red bird: {}", limit=60).read("cat and dog")
    assert tokens.find("cat")
    assert tokens.find("cat")[0] < tokens.find("dog")[0]
