"""Training of the words of motion: further rows of the shared text encoder's vocabulary, and nothing else of it.

The encoder has been trained on captions of pictures. What it makes of a new word follows from the word's row alone,
which a text-only task teaches: the vector at "left" is to tell not only the motion but also whose it is, shape and
colour, so that one look at it tells the video model what moves where.
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
from .captions_video import clip_caption
from .crew import SOLO, Crew
from .motion import MOTIONS, sample_clip
from .tokenizer import encode_captions, load_tokenizer
from .train_text import IGNORE
from .world import COLOURS, SHAPES, scene_rng

EMBEDDING = "embeddings.token_embedding.weight"
_CLASSES = (len(SHAPES), len(COLOURS) + 1, len(MOTIONS))


@dataclass(frozen=True)
class WordsRecipe:
    """Settings of `train_motion_words`."""

    batch: int = 64
    lr: float = 1e-2
    warmup: int = 20
    seed: int = 0


def motion_labels(captions: list[str]) -> Tensor:
    """What each token should tell: (captions, 32, 3) of shape, colour, motion indices, IGNORE away from motions.

    The colour is the one said of that thing, or the last index when none was.
    """
    out = torch.full((len(captions), models.TEXT_LENGTH, 3), IGNORE)
    for row, caption in enumerate(captions):
        shape, colour = 0, len(COLOURS)
        for position, word in enumerate(caption.replace(",", " ,").split(), start=1):
            if word in SHAPES:
                shape = SHAPES.index(word)
            elif word in COLOURS:
                colour = COLOURS.index(word)
            elif word in MOTIONS:
                out[row, position] = torch.tensor([shape, colour, list(MOTIONS).index(word)])
            elif word not in ("moving", "standing"):
                colour = len(COLOURS)
    return out


class MotionReader(nn.Module):
    """The frozen text encoder, rows for further words, and linear heads for what their vectors tell."""

    def __init__(self, encoder: CLIPTextModel, words: int) -> None:
        super().__init__()
        self.encoder = encoder.eval().requires_grad_(False)
        self.rows = nn.Parameter(0.05 * torch.randn(words, models.TEXT_WIDTH))
        self.heads = nn.Linear(models.TEXT_WIDTH, sum(_CLASSES))

    def table(self) -> Tensor:
        """The rows of all words, (words, 128)."""
        return torch.cat([self.encoder.get_input_embeddings().weight, self.rows])

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        """Logits of shape, colour and motion at every token, (n, tokens, classes) each."""
        output = torch.func.functional_call(self.encoder, {EMBEDDING: self.table()}, kwargs={"input_ids": ids})
        return self.heads(output.last_hidden_state).split(_CLASSES, dim=-1)


def _captions(recipe: WordsRecipe, step: int) -> list[str]:
    rng = scene_rng(recipe.seed + 78, step)
    return [clip_caption(sample_clip(rng, held_out="any"), rng) for _ in range(recipe.batch)]


def train_motion_words(
    encoder: CLIPTextModel,
    out: Path,
    budget: Budget,
    recipe: WordsRecipe,
    device: str = "cpu",
    resume: bool = False,
    crew: Crew = SOLO,
) -> CLIPTextModel:
    """Teach the words of motion to a trained text encoder; checkpoint in `out/words.pt`.

    Args:
        encoder: of the tokenizer without those words; left as it is.
        out, budget, recipe, device, resume, crew: as in the other stages.

    Returns:
        The encoder with a larger vocabulary, in evaluation mode; every weight it had is the same.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    tokenizer = load_tokenizer("video")
    known = encoder.get_input_embeddings().num_embeddings
    reader = MotionReader(encoder, len(tokenizer) - known).to(device)
    trained = nn.ModuleDict({"heads": reader.heads})
    trained.register_parameter("rows", reader.rows)
    optimiser = torch.optim.AdamW(trained.parameters(), recipe.lr, betas=(0.9, 0.99), weight_decay=0.0)
    stage = Stage(out / "words.pt", budget, {"trained": trained, "optimiser": optimiser}, crew)
    if resume:
        stage.resume()
    model = crew.wrap(reader)
    bar = stage.bar("words")
    stage.start_clock()
    while stage.progress < 1:
        captions = _captions(recipe, stage.step)
        stage.set_rate(optimiser, learning_rate(recipe.lr, stage.progress, stage.step, recipe.warmup))
        ids, labels = (crew.share(t).to(device) for t in (encode_captions(captions, "video"), motion_labels(captions)))
        parts = model(ids)
        losses = [
            functional.cross_entropy(p.flatten(0, 1), labels[..., i].flatten(), ignore_index=IGNORE)
            for i, p in enumerate(parts)
        ]
        loss = torch.stack(losses).sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        stage.advance()
        bar.set_postfix(step=stage.step, loss=f"{loss.item():.4f}", refresh=False)
        bar.update(int(1000 * stage.progress) - bar.n)
    bar.close()
    stage.save()
    return widened(encoder, reader.rows.detach().cpu())


def widened(encoder: CLIPTextModel, rows: Tensor) -> CLIPTextModel:
    """The encoder with further rows (words, 128) in its vocabulary, in evaluation mode."""
    table = torch.cat([encoder.get_input_embeddings().weight.detach().cpu(), rows])
    config = encoder.config
    wide = models.text_encoder(len(table), config.bos_token_id, config.eos_token_id)
    wide.load_state_dict({**{k: v.cpu() for k, v in encoder.state_dict().items()}, EMBEDDING: table})
    return wide.eval()
