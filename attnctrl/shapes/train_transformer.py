"""Training of the joint-attention model: flow matching between noise and the shipped autoencoder's latents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from attnctrl.processors.packing import blocks_of_pictures

from . import models
from .budget import Budget, Stage
from .captions import training_caption
from .crew import SOLO, Crew
from .ema import Average
from .muon import Muon
from .tokenizer import encode_captions
from .train_autoencoder import fast_bfloat16
from .train_denoiser import world_scene
from .world import Scene, scene_rng


@dataclass(frozen=True)
class TransformerRecipe:
    """Settings of `train_transformer`.

    flat: the share of the budget after which the rates fall linearly to 0. compiled: run the blocks through
    torch.compile, a sixth faster on a CPU, which needs a C++ compiler there.
    """

    batch: int = 32
    lr: float = 1e-3
    matrix_lr: float = 2e-3
    warmup: int = 100
    flat: float = 0.45
    ema: float = 0.998
    seed: int = 0
    compiled: bool = False


def flow_rate(progress: float, step: int, recipe: TransformerRecipe) -> float:
    """The factor of both learning rates: linear warm-up, 1 until `flat` of the budget, then linear to 0."""
    fall = min(1.0, (1 - progress) / (1 - recipe.flat))
    return min(1.0, (step + 1) / recipe.warmup) * fall


def draw_flow(recipe: TransformerRecipe, step: int, latents: Tensor, scenes: list[Scene]) -> tuple[Tensor, ...]:
    """Clean latents (n, 4, 16, 16), noise, sigmas (n,), token ids (n, 32): a function of (seed, step) alone.

    Sigmas are logit-normal, sigmoid(N(0, 1)), as Stable Diffusion 3 recommends (arXiv 2403.03206).
    """
    rng = scene_rng(recipe.seed + 200, step)
    chosen = rng.integers(0, len(scenes), recipe.batch)
    ids = encode_captions([training_caption(scenes[i], rng) for i in chosen])
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    clean = latents[torch.from_numpy(chosen)].float()
    noise = torch.randn(clean.shape, generator=generator)
    return clean, noise, torch.randn(recipe.batch, generator=generator).sigmoid(), ids


class Velocity(nn.Module):
    """The transformer with the frozen text encoder, on unpacked latents."""

    def __init__(self, transformer: FluxTransformer2DModel, text: CLIPTextModel) -> None:
        super().__init__()
        self.transformer, self.text = transformer, text.requires_grad_(False)
        height = width = models.LATENT_SIZE // 2
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
        self.register_buffer("places", places.float(), persistent=False)

    def forward(self, noisy: Tensor, sigmas: Tensor, ids: Tensor) -> Tensor:
        """Predicted velocity, noise - latents, (n, 64, 16) packed, from noisy latents (n, 4, 16, 16)."""
        with torch.no_grad():
            text = self.text(input_ids=ids)
        output = self.transformer(
            hidden_states=blocks_of_pictures(noisy),
            timestep=sigmas,
            encoder_hidden_states=text.last_hidden_state,
            pooled_projections=text.pooler_output,
            txt_ids=torch.zeros(ids.shape[1], 3, device=ids.device),
            img_ids=self.places,
            return_dict=False,
        )
        return output[0]


def optimisers(transformer: nn.Module, recipe: TransformerRecipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else."""
    inside = {n: p for n, p in transformer.named_parameters() if "transformer_blocks." in n and p.ndim == 2}
    outside = [p for n, p in transformer.named_parameters() if n not in inside]
    return [
        Muon(inside.values(), lr=recipe.matrix_lr),
        torch.optim.AdamW(outside, lr=recipe.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True),
    ]


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
    both = optimisers(transformer, recipe)
    rates = [optimiser.param_groups[0]["lr"] for optimiser in both]
    state: dict[str, Any] = {"transformer": transformer, "average": average, "muon": both[0], "adamw": both[1]}
    stage = Stage(out / "transformer.pt", budget, state, crew)
    if resume:
        stage.resume()
    if recipe.compiled:
        transformer.compile()
    model = crew.wrap(Velocity(transformer, text.to(device).eval()).to(device))
    scenes = [world_scene(i) for i in range(len(latents))]
    bar = stage.bar("transformer")
    smooth = None
    stage.start_clock()
    while stage.progress < 1:
        clean, noise, sigmas, ids = (crew.share(t).to(device) for t in draw_flow(recipe, stage.step, latents, scenes))
        mix = sigmas[:, None, None, None]
        with torch.autocast(device, torch.bfloat16, enabled=fast_bfloat16(device)):
            predicted = model((1 - mix) * clean + mix * noise, sigmas, ids)
        loss = (predicted.float() - blocks_of_pictures(noise - clean)).square().mean()
        for optimiser, rate in zip(both, rates, strict=True):
            stage.set_rate(optimiser, rate * flow_rate(stage.progress, stage.step, recipe))
            optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        for optimiser in both:
            optimiser.step()
        average.update()
        stage.advance()
        value = loss.item()
        smooth = value if smooth is None else 0.99 * smooth + 0.01 * value
        bar.set_postfix(step=stage.step, loss=f"{smooth:.4f}", refresh=False)
        bar.update(int(1000 * stage.progress) - bar.n)
    bar.close()
    stage.save()
    average.copy_to({"transformer": transformer})
    return transformer.eval()
