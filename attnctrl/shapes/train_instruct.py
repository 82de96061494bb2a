"""Training of the instruction-following model: the denoiser of `sd`, which learns to see a given picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextModel

from . import models
from .budget import Budget, Stage
from .crew import SOLO, Crew
from .ema import Average
from .instructions import Change, sample_change, training_instruction
from .render import render
from .tokenizer import encode_captions
from .train_autoencoder import fast_bfloat16
from .train_denoiser import DenoiserRecipe, draw_noise, fit_noise
from .world import scene_rng

CHANGES_SEED = 5


@dataclass(frozen=True)
class InstructRecipe(DenoiserRecipe):
    """Settings of `train_instruct`. dropped: share of samples without text, without picture, and without both, each.

    snr_cap: so low that errors of the picture, not of its noise, count alike at most noise levels. What is to be copied
    and what changes is decided at high ones, where an error of the whole picture hardly shows in the noise.
    """

    lr: float = 5e-4
    snr_cap: float = 0.05
    dropped: float = 0.05


def world_change(index: int) -> Change:
    """Training pair `index`."""
    return sample_change(scene_rng(CHANGES_SEED, index))


def render_change(change: Change, index: int) -> Tensor:
    """Before and after, (2, 3, 128, 128) in 0..1: ground and colours of what stays are the same in both.

    The generator gives its numbers to the ground and then to the things in order, of which those that change are last.
    """
    pair = (
        render([scene], models.IMAGE_SIZE, scene_rng(CHANGES_SEED + 1, index))
        for scene in (change.before, change.after)
    )
    return torch.cat(list(pair))


def encode_changes(crew: Crew, vae_path: Path, part: Path, count: int, device: str, chunk: int = 16) -> None:
    """Write this process's chunks of latents to `part` with its rank appended: {first index: (n, 2, 4, 16, 16)}."""
    vae = AutoencoderTiny.from_pretrained(vae_path).float().to(device, memory_format=torch.channels_last)
    parts: dict[int, Tensor] = {}
    starts = range(chunk * crew.rank, count, chunk * crew.size)
    for start in tqdm(starts, desc="latents", mininterval=10, disable=crew.rank > 0):
        images = torch.cat([render_change(world_change(i), i) for i in range(start, min(start + chunk, count))]) * 2 - 1
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=fast_bfloat16(device)):
            latents = vae.encode(images.to(device, memory_format=torch.channels_last)).latents
        parts[start] = latents.float().cpu().unflatten(0, (-1, 2))
    torch.save(parts, f"{part}{crew.rank}")


def draw_changes(recipe: InstructRecipe, step: int, latents: Tensor, changes: list[Change]) -> tuple[Tensor, ...]:
    """Clean latents (n, 4, 16, 16), noise, timesteps (n,), the given pictures' latents, token ids (n, 32).

    A function of (seed, step) alone. Reversible changes are drawn in both directions.
    """
    rng = scene_rng(recipe.seed + 400, step)
    chosen = rng.integers(0, len(changes), recipe.batch)
    back, dropped = rng.random(recipe.batch), rng.random(recipe.batch) / max(recipe.dropped, 1e-9)
    pictures, wanted, texts = [], [], []
    for i, turn, drop in zip(chosen, back, dropped, strict=True):
        change, (before, after) = changes[i], latents[i].float()
        if turn < 0.5 and change.reversible:
            change, before, after = change.reversed(), after, before
        text = training_instruction(change, rng)
        wanted.append(after)
        texts.append("" if drop < 1 or 2 <= drop < 3 else text)
        pictures.append(torch.zeros_like(before) if 1 <= drop < 3 else before)
    clean = torch.stack(wanted)
    return clean, *draw_noise(recipe, step, clean), torch.stack(pictures), encode_captions(texts)


def widened(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The denoiser with a given picture as further input channels, which count for nothing yet."""
    wide = models.denoiser(in_channels=2 * models.LATENT_CHANNELS)
    state = {name: tensor.float() for name, tensor in unet.state_dict().items()}
    weight = state["conv_in.weight"]
    state["conv_in.weight"] = torch.cat([weight, torch.zeros_like(weight)], dim=1)
    wide.load_state_dict(state)
    return wide


class Instructed(nn.Module):
    """The widened denoiser with the frozen text encoder."""

    def __init__(self, unet: UNet2DConditionModel, text: CLIPTextModel) -> None:
        super().__init__()
        self.unet, self.text = unet, text.requires_grad_(False)

    def forward(self, noisy: Tensor, steps: Tensor, pictures: Tensor, ids: Tensor) -> Tensor:
        """Predicted noise (n, 4, 16, 16) from noisy and given latents, timesteps (n,) and token ids (n, 32)."""
        with torch.no_grad():
            condition = self.text(input_ids=ids).last_hidden_state
        given = torch.cat([noisy, pictures], dim=1).contiguous(memory_format=torch.channels_last)
        return self.unet(given, steps, condition, return_dict=False)[0]


def train_instruct(
    unet: UNet2DConditionModel,
    text: CLIPTextModel,
    latents: Tensor,
    out: Path,
    budget: Budget,
    recipe: InstructRecipe,
    device: str = "cpu",
    resume: bool = False,
    crew: Crew = SOLO,
) -> UNet2DConditionModel:
    """Train the denoiser on pairs of pictures (Brooks et al., arXiv 2211.09800); checkpoint in `out/instruct.pt`.

    Args:
        unet: a denoiser of `sd`, where training starts.
        text: its text encoder, which stays as it is.
        latents: (changes, 2, 4, 16, 16) of the first changes, before and after.
        out, budget, recipe, device, resume, crew: as in `train_denoiser`.

    Returns:
        The averaged denoiser of 8 input channels, in evaluation mode.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    wide = widened(unet).to(device, memory_format=torch.channels_last).train()
    # On CPUs the fused attention's backward pass is slower than plain products at 64 to 256 tokens.
    wide.set_attn_processor(AttnProcessor() if device == "cpu" else AttnProcessor2_0())
    average = Average({"unet": wide}, recipe.ema)
    optimiser = torch.optim.AdamW(wide.parameters(), recipe.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    stage = Stage(out / "instruct.pt", budget, {"unet": wide, "average": average, "optimiser": optimiser}, crew)
    if resume:
        stage.resume()
    changes = [world_change(i) for i in range(len(latents))]

    def draw(step: int) -> tuple[Tensor, ...]:
        return draw_changes(recipe, step, latents, changes)

    fit_noise(stage, Instructed(wide, text.to(device).eval()).to(device), draw, average, optimiser, recipe, device)
    average.copy_to({"unet": wide})
    return wide.eval()
