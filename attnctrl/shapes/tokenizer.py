"""The shapes world's tokenizer: a CLIPTokenizer in which every word of the world is one token.

It was built once by `build` and is committed with the weights; everything else loads that file, because token ids
are part of a trained model. The video model's has more words, and the same ids for the others.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from .captions import WORDS
from .captions_video import MOTION_WORDS
from .captions_video import WORDS as VIDEO_WORDS
from .models import TEXT_LENGTH

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
WEIGHTS = Path(__file__).parent / "weights"


def byte_alphabet() -> list[str]:
    """The 256 printable stand-ins for bytes that CLIP's byte-level BPE uses, in byte order."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    spare = (256 + n for n in range(256))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


def merges_for(words: Sequence[str], before: Sequence[tuple[str, str]] = ()) -> list[tuple[str, str]]:
    """Byte-pair merges that end with every word as one symbol; ties go to the alphabetically first pair.

    A library's BPE trainer breaks ties differently from process to process, hence this one.
    before: merges that come first, and are not returned.
    """
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words]
    for pair in before:
        spelled = [_merge(s, pair) for s in spelled]
    merges: list[tuple[str, str]] = []
    while any(len(s) > 1 for s in spelled):
        counts = Counter(pair for s in spelled for pair in pairwise(s))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        spelled = [_merge(s, best) for s in spelled]
    return merges


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for symbol in symbols:
        if out and (out[-1], symbol) == pair and not out[-1].endswith("</w>"):
            out[-1] += symbol
        else:
            out.append(symbol)
    return out


def build() -> CLIPTokenizer:
    """Construct the tokenizer anew; equal to the committed one as long as `WORDS` is."""
    merges = merges_for(WORDS)
    symbols = byte_alphabet()
    symbols += [s + "</w>" for s in symbols] + [a + b for a, b in merges] + [BOS, EOS]
    vocab = {s: i for i, s in enumerate(dict.fromkeys(symbols))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_LENGTH)


def load_tokenizer(name: str = "sd") -> CLIPTokenizer:
    """The tokenizer of a shapes model: the committed one, or for "video" that one with the words of motion."""
    committed = CLIPTokenizer.from_pretrained(WEIGHTS / "sd" / "tokenizer")
    return extended(committed, MOTION_WORDS) if name == "video" else committed


def extended(tokenizer: CLIPTokenizer, words: Sequence[str]) -> CLIPTokenizer:
    """A tokenizer with further words, whose ids come last; what it made of the words it had, it still makes."""
    known = [(a, b) for a, b in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
    merges = merges_for(words, known)
    vocab = dict(tokenizer.get_vocab())
    for symbol in (a + b for a, b in merges):
        vocab.setdefault(symbol, len(vocab))
    return CLIPTokenizer(vocab=vocab, merges=known + merges, model_max_length=tokenizer.model_max_length)


@lru_cache
def _word_ids(name: str) -> tuple[dict[str, int], int, int]:
    tokenizer = load_tokenizer(name)
    vocab = tokenizer.get_vocab()
    words = VIDEO_WORDS if name == "video" else WORDS
    return {w: vocab[w + "</w>"] for w in words}, tokenizer.bos_token_id, tokenizer.eos_token_id


def encode_captions(captions: Sequence[str], name: str = "sd") -> Tensor:
    """Ids of captions made of the world's words only: what the tokenizer gives, about 50 times faster.

    Returns:
        (captions, 32) int64, begun by bos, ended and padded by eos.

    Raises:
        KeyError: a caption holds a word that the model's captions never do.
        ValueError: a caption is longer than 30 tokens.
    """
    ids, bos, eos = _word_ids(name)
    out = torch.full((len(captions), TEXT_LENGTH), eos, dtype=torch.int64)
    for row, caption in enumerate(captions):
        words = caption.replace(",", " ,").split()
        if len(words) > TEXT_LENGTH - 2:
            raise ValueError(f"caption of {len(words)} tokens does not fit {TEXT_LENGTH - 2}: {caption!r}")
        out[row, : len(words) + 1] = torch.tensor([bos, *(ids[w] for w in words)])
    return out
