"""Second stage of training: the text encoder learns to read before the denoiser listens to it.

Stable Diffusion starts from a text encoder trained by CLIP. Here a text-only task plays that part: each noun's
vector must tell its shape, colour and size, and the end-of-text vectors the whole scene. It takes about a minute
and spares the denoiser from having to discover grammar through noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextModel

from . import models
from .budget import Budget, Stage, learning_rate
from .captions import SIZES, training_caption
from .crew import SOLO, Crew
from .tokenizer import encode_captions, load_tokenizer
from .world import BACKGROUNDS, COLOURS, SHAPES, sample_scene, scene_rng

IGNORE = -100
_NOUN_CLASSES = (len(SHAPES), len(COLOURS) + 1, len(SIZES) + 1)


@dataclass(frozen=True)
class TextRecipe:
    """Settings of `train_text_encoder`."""

    batch: int = 64
    lr: float = 1.5e-3
    warmup: int = 50
    seed: int = 0


def noun_labels(captions: list[str]) -> Tensor:
    """What each token should tell: (captions, 32, 3) of shape, colour, size indices, IGNORE away from nouns.

    Colour and size are those said of that noun, or the last index when nothing was said.
    """
    out = torch.full((len(captions), models.TEXT_LENGTH, 3), IGNORE)
    for row, caption in enumerate(captions):
        colour, size = len(COLOURS), len(SIZES)
        for position, word in enumerate(caption.replace(",", " ,").split(), start=1):
            if word in SHAPES:
                out[row, position] = torch.tensor([SHAPES.index(word), colour, size])
                colour, size = len(COLOURS), len(SIZES)
            elif word in COLOURS:
                colour = COLOURS.index(word)
            elif word in SIZES:
                size = SIZES.index(word)
    return out


def scene_labels(captions: list[str], nouns: Tensor) -> Tensor:
    """What a whole caption tells: (captions, 8 * 9 + 5) multi-hot over (shape, colour or none) and backgrounds."""
    kinds = len(COLOURS) + 1
    out = torch.zeros(len(captions), len(SHAPES) * kinds + len(BACKGROUNDS) + 1)
    for row, caption in enumerate(captions):
        for shape, colour, _ in nouns[row][nouns[row, :, 0] != IGNORE].tolist():
            out[row, shape * kinds + colour] = 1
        named = [i for i, b in enumerate(BACKGROUNDS) if f"{b} background" in caption]
        out[row, len(SHAPES) * kinds + (named[0] if named else len(BACKGROUNDS))] = 1
    return out


class Reader(nn.Module):
    """A text encoder with linear heads for what its vectors tell."""

    def __init__(self, encoder: CLIPTextModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.noun = nn.Linear(models.TEXT_WIDTH, sum(_NOUN_CLASSES))
        self.scene = nn.Linear(models.TEXT_WIDTH, len(SHAPES) * (len(COLOURS) + 1) + len(BACKGROUNDS) + 1)

    def forward(self, ids: Tensor, nouns: Tensor, scenes: Tensor) -> Tensor:
        """The loss: cross-entropy at nouns plus binary cross-entropy at end-of-text and padding tokens."""
        hidden = self.encoder(input_ids=ids).last_hidden_state
        parts = self.noun(hidden).split(_NOUN_CLASSES, dim=-1)
        total = sum(
            functional.cross_entropy(p.flatten(0, 1), nouns[..., i].flatten(), ignore_index=IGNORE)
            for i, p in enumerate(parts)
        )
        padding = ids == self.encoder.config.eos_token_id
        row, _ = padding.nonzero(as_tuple=True)
        told = functional.binary_cross_entropy_with_logits(self.scene(hidden[padding]), scenes[row])
        return total + 20 * told


def train_text_encoder(
    out: Path,
    budget: Budget,
    recipe: TextRecipe,
    device: str = "cpu",
    resume: bool = False,
    crew: Crew = SOLO,
) -> CLIPTextModel:
    """Train the text encoder on the reading task; checkpoint in `out/text.pt`. Arguments as in the other stages."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    tokenizer = load_tokenizer()
    reader = Reader(models.text_encoder(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)).to(device)
    optimiser = torch.optim.AdamW(reader.parameters(), recipe.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    stage = Stage(out / "text.pt", budget, {"reader": reader, "optimiser": optimiser}, crew)
    if resume:
        stage.resume()
    model = crew.wrap(reader)
    bar = stage.bar("text")
    stage.start_clock()
    while stage.progress < 1:
        rng = scene_rng(recipe.seed + 77, stage.step)
        captions = [training_caption(sample_scene(rng, held_out="any"), rng) for _ in range(recipe.batch)]
        nouns = noun_labels(captions)
        stage.set_rate(optimiser, learning_rate(recipe.lr, stage.progress, stage.step, recipe.warmup))
        ids = encode_captions(captions)
        # Attention is causal, so tokens after the longest caption teach nothing new: leave them out.
        length = int((ids != ids[0, -1]).sum(1).max()) + 2
        labels = (ids[:, :length], nouns[:, :length], scene_labels(captions, nouns))
        loss = model(*(crew.share(t).to(device) for t in labels))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimiser.step()
        stage.advance()
        bar.set_postfix(step=stage.step, loss=f"{loss.item():.4f}", refresh=False)
        bar.update(int(1000 * stage.progress) - bar.n)
    bar.close()
    stage.save()
    return reader.encoder
