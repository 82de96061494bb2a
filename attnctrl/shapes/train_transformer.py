"""Training of the joint-attention model on the latents of the shipped autoencoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from . import models
from .budget import Budget, Stage
from .captions import training_caption
from .crew import SOLO, Crew
from .ema import Average
from .muon import Muon
from .tokenizer import encode_captions
from .train_denoiser import world_scene
from .train_flow import FlowRecipe, Velocity, draw_noise, fit_velocity
from .world import Scene, scene_rng


@dataclass(frozen=True)
class TransformerRecipe(FlowRecipe):
    """Settings of `train_transformer`. matrix_lr: of the blocks' matrices; lr: of all else."""

    lr: float = 1e-3
    matrix_lr: float = 2e-3


def draw_flow(recipe: FlowRecipe, step: int, latents: Tensor, scenes: list[Scene]) -> tuple[Tensor, ...]:
    """Clean latents (n, 4, 16, 16), noise, sigmas (n,), token ids (n, 32): a function of (seed, step) alone."""
    rng = scene_rng(recipe.seed + 200, step)
    chosen = rng.integers(0, len(scenes), recipe.batch)
    ids = encode_captions([training_caption(scenes[i], rng) for i in chosen])
    clean = latents[torch.from_numpy(chosen)].float()
    return clean, *draw_noise(recipe, step, clean), ids


def optimisers(transformer: nn.Module, matrix_lr: float, lr: float) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for the matrices of the blocks, AdamW for everything else."""
    inside = {n: p for n, p in transformer.named_parameters() if "blocks." in n and p.ndim == 2}
    outside = [p for n, p in transformer.named_parameters() if n not in inside]
    return (
        Muon(inside.values(), lr=matrix_lr),
        torch.optim.AdamW(outside, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True),
    )


def train_transformer(
    text: CLIPTextModel,
    latents: Tensor,
    out: Path,
    budget: Budget,
    recipe: TransformerRecipe,
    device: str = "cpu",
    resume: bool = False,
    crew: Crew = SOLO,
) -> FluxTransformer2DModel:
    """Train the transformer to predict the velocity; checkpoint in `out/transformer.pt`.

    Args:
        text: the text encoder, which stays as it is.
        latents: (scenes, 4, 16, 16) of the first scenes of the world.
        out, budget, recipe, device, resume, crew: as in `train_denoiser`.

    Returns:
        The averaged model, in evaluation mode.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    transformer = models.transformer().to(device).train()
    average = Average({"transformer": transformer}, recipe.ema)
    muon, adamw = optimisers(transformer, recipe.matrix_lr, recipe.lr)
    state: dict[str, Any] = {"transformer": transformer, "average": average, "muon": muon, "adamw": adamw}
    stage = Stage(out / "transformer.pt", budget, state, crew)
    if resume:
        stage.resume()
    velocity = Velocity(transformer, text.to(device).eval()).to(device)
    scenes = [world_scene(i) for i in range(len(latents))]

    def draw(step: int) -> tuple[Tensor, ...]:
        return draw_flow(recipe, step, latents, scenes)

    fit_velocity(stage, velocity, draw, average, [(muon, recipe.matrix_lr), (adamw, recipe.lr)], recipe, device)
    average.copy_to({"transformer": transformer})
    return transformer.eval()
