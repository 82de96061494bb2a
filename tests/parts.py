"""Small random parts that the tiny transformer pipelines share, and what the tests must know of each pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from diffusers import AutoencoderKL
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextModel, GemmaTokenizer, Qwen2Tokenizer, T5Config, T5EncoderModel, T5Tokenizer

from tests import tiny

LETTERS = "abcdefghijklmnopqrstuvwxyz,.-"
TOKENS = 12  # of T5, padding included


@cache
def t5_tokenizer() -> T5Tokenizer:
    """Whole words where the tests name them, letters for the rest."""
    words = [("▁" + word, -2.0) for word in tiny.WORDS]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -5.0), *words, *((c, -8.0) for c in LETTERS)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=TOKENS)


def merged(letters: list[str], space: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a BPE tokenizer: letters, and whole words behind a space."""
    vocab = {letter: i for i, letter in enumerate(letters)}
    merges = []
    for word in tiny.WORDS:
        left = space
        for letter in word:
            if (left, letter) not in merges:
                merges.append((left, letter))
            left += letter
            vocab.setdefault(left, len(vocab))
    return vocab, merges


@cache
def gemma_tokenizer() -> GemmaTokenizer:
    letters = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS]
    vocab, merges = merged(letters, "▁")
    return GemmaTokenizer(vocab=vocab, merges=merges, model_max_length=64)


CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def qwen_tokenizer() -> Qwen2Tokenizer:
    vocab, merges = merged(sorted(ByteLevel.alphabet()), "Ġ")
    made = Qwen2Tokenizer(vocab=vocab, merges=merges, model_max_length=512, chat_template=CHAT)
    marks = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    made.add_tokens(list(marks), special_tokens=True)
    return made


def t5(width: int = 16) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(t5_tokenizer()), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return T5EncoderModel(config).eval()


def clip() -> CLIPTextModel:
    return CLIPTextModel(tiny.text_config()).eval()


def vae(channels: int = 4) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 8),
        latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        shift_factor=0.0,
        scaling_factor=1.0,
    ).eval()


def revived(model: Any) -> Any:
    """The model with its zero-initialised gates drawn at random, without which no attention reaches the output."""
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@dataclass(frozen=True)
class Tiny:
    """make: the pipeline. guided, free: the call's arguments with and without classifier-free guidance.

    size: (height, width) in pixels; grid: the latent tokens that it gives. sites: how many layers can be controlled,
    of all experts together. more: further arguments of every call; of_two: of a call with two prompts. given_frame:
    whether the first frame is that of a given picture. condition: the part of the denoiser's input that is no latents.
    unguided: there is no unconditional branch. rescaled: the pipeline rescales what guidance makes. plus: by how much
    the guidance scale is larger than what the pipeline calls so. masks: padded text is invisible.
    """

    make: Callable[[], Any]
    guided: dict[str, Any]
    free: dict[str, Any]
    size: tuple[int, int]
    grid: tuple[int, int, int]
    sites: int
    more: dict[str, Any] = field(default_factory=dict)
    of_two: dict[str, Any] = field(default_factory=dict)
    experts: int = 1
    given_frame: bool = False
    condition: Callable[[torch.Tensor], torch.Tensor] | None = None
    unguided: bool = False
    rescaled: bool = False
    plus: float = 0.0
    masks: bool = False
