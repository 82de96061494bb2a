import hashlib
import json

import pytest

from attnctrl.shapes import prompt_for, sample_scene, scene_rng
from attnctrl.shapes.captions import P_EMPTY, WORDS, training_caption
from attnctrl.shapes.tokenizer import build, encode_captions, load_tokenizer
from attnctrl.shapes.train_text import noun_labels, scene_labels


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def captions():
    rng = scene_rng(2, 0)
    return [training_caption(sample_scene(scene_rng(1, i)), rng) for i in range(1500)]


@pytest.mark.parametrize(
    ("things", "background", "prompt"),
    [
        ([("circle", "red")], None, "a red circle"),
        ([("circle", "red"), ("square", "orange")], "white", "a red circle and an orange square on a white background"),
        (
            [("circle", "red"), ("square", "blue"), ("star", "green")],
            "gray",
            "a red circle, a blue square and a green star on a gray background",
        ),
    ],
)
def test_canonical_prompt(things, background, prompt):
    text, phrases = prompt_for(things, background)
    assert text == prompt
    assert all(p in text for p in phrases)
    assert len(phrases) == len(things)


def test_prompt_needs_a_thing():
    with pytest.raises(ValueError, match="at least one thing"):
        prompt_for([])


def test_captions_use_the_worlds_words_only(captions):
    assert {w for c in captions for w in c.replace(",", " ,").split()} == set(WORDS)


def test_captions_vary_as_documented(captions):
    full = [c for c in captions if c]
    assert abs(1 - len(full) / len(captions) - P_EMPTY) < 0.03
    assert abs(sum("background" in c for c in full) / len(full) - 0.8) < 0.04
    assert not any(w in c for c in captions for w in ("left", "right", "above", "below"))


def test_size_words_are_kept_for_extremes():
    for i in range(300):
        scene = sample_scene(scene_rng(4, i), counts=1)
        caption, r = training_caption(scene, scene_rng(5, i)), scene.things[0].r
        assert "small" not in caption or r < 0.112
        assert "large" not in caption or r > 0.175


def test_every_word_is_one_token(tokenizer):
    for word in WORDS:
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1


def test_vocabulary_and_ids_are_frozen(tokenizer):
    vocab = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=True)
    assert hashlib.sha256(vocab.encode()).hexdigest()[:16] == "d2636aa30b025c11"
    sentence = "a red circle, an orange square and a large heart next to a cross on a white background"
    assert tokenizer(sentence).input_ids == [
        617,
        353,
        606,
        557,
        300,
        518,
        597,
        610,
        537,
        353,
        590,
        578,
        593,
        524,
        353,
        560,
        595,
        353,
        614,
        544,
        618,
    ]


def test_committed_tokenizer_is_what_build_builds(tokenizer):
    built = build()
    assert built.get_vocab() == tokenizer.get_vocab()
    sentence = "a small zebra and a pink ring"
    assert built(sentence).input_ids == tokenizer(sentence).input_ids


def test_special_tokens_and_length(tokenizer):
    assert tokenizer.model_max_length == 32
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == len(tokenizer) - 1
    assert tokenizer.bos_token_id == len(tokenizer) - 2


def test_unknown_words_fall_back_to_letters(tokenizer):
    ids = tokenizer("zebra ÉTÉ ?", add_special_tokens=False).input_ids
    assert len(ids) > 6
    assert tokenizer.eos_token_id not in ids


def test_offsets_point_into_the_text(tokenizer):
    text = "a red circle, a blue square"
    offsets = tokenizer(text, return_offsets_mapping=True).offset_mapping[1:-1]
    assert [text[a:b] for a, b in offsets] == ["a", "red", "circle", ",", "a", "blue", "square"]


def test_fast_encoding_equals_the_tokenizer(tokenizer, captions):
    slow = tokenizer(
        captions[:300], padding="max_length", max_length=32, truncation=True, return_tensors="pt"
    ).input_ids
    assert encode_captions(captions[:300]).equal(slow)


def test_fast_encoding_refuses_strange_or_long_captions():
    with pytest.raises(KeyError, match="zebra"):
        encode_captions(["a zebra"])
    with pytest.raises(ValueError, match="does not fit"):
        encode_captions(["red " * 31])


def test_reading_labels():
    caption = "a small red circle and a star on a white background"
    nouns = noun_labels([caption])
    assert nouns[0, 4].tolist() == [0, 0, 0]  # circle, red, small
    assert nouns[0, 7].tolist() == [3, 8, 2]  # star, no colour, no size
    assert (nouns[0, :, 0] >= 0).sum() == 2
    scene = scene_labels([caption], nouns)[0]
    assert scene.nonzero().flatten().tolist() == [0, 3 * 9 + 8, 72]
