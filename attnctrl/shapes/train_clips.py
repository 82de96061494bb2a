"""Training of the video transformer on the latents of clips."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextModel

from . import models_video
from .budget import Budget, Stage
from .captions import training_caption
from .captions_video import clip_caption
from .crew import SOLO, Crew
from .directed import direct_heads
from .ema import Average
from .frames import encode_frames
from .motion import FRAMES, Clip, sample_clip
from .render import render_clip
from .tokenizer import encode_captions
from .train_autoencoder import fast_bfloat16
from .train_denoiser import gathered
from .train_flow import FlowRecipe, draw_noise, fit_velocity
from .train_transformer import optimisers
from .world import scene_rng

CLIPS_SEED = 3


@dataclass(frozen=True)
class ClipRecipe(FlowRecipe):
    """Settings of `encode_clips` and `train_clips`.

    matrix_lr: of the blocks' matrices; lr: of all else. stills: the share of the budget, its first, that is spent on
    single frames: one costs a tenth of a clip, and shapes and colours are learned from either. still_batch: frames in
    place of one clip there. shift: of the sigmas of clips towards noise, where the ways of things are decided.
    """

    batch: int = 16
    flat: float = 0.55
    clips: int = 10_000
    lr: float = 1e-3
    matrix_lr: float = 2e-3
    stills: float = 0.13
    still_batch: int = 4
    shift: float = 4.0


def world_clip(index: int) -> Clip:
    """Training clip `index`: trained pairs only, one or two things."""
    return sample_clip(scene_rng(CLIPS_SEED, index))


def encode_clips(crew: Crew, vae_path: Path, part: Path, count: int, device: str, chunk: int = 8) -> None:
    """Write this process's chunks of latents to `part` with its rank appended: {first index: (n, 4, 9, 16, 16)}."""
    vae = AutoencoderKLWan.from_pretrained(vae_path).to(device)
    parts: dict[int, Tensor] = {}
    starts = range(chunk * crew.rank, count, chunk * crew.size)
    for start in tqdm(starts, desc="latents", mininterval=10, disable=crew.rank > 0):
        indices = range(start, min(start + chunk, count))
        frames = [render_clip(world_clip(i).scenes, rng=scene_rng(CLIPS_SEED + 1, i)) for i in indices]
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=fast_bfloat16(device)):
            latents = encode_frames(vae, torch.cat(frames).to(device) * 2 - 1)
        # Halved here: float32 of all clips would take gigabytes. The values are of the order of 1.
        parts[start] = latents.half().cpu().unflatten(0, (-1, FRAMES)).transpose(1, 2)
    torch.save(parts, f"{part}{crew.rank}")


def encode_world_clips(vae: AutoencoderKLWan, out: Path, count: int, device: str = "cpu", processes: int = 1) -> Tensor:
    """Latents of the first `count` training clips, whitened; the whitening is written into the autoencoder's config.

    Results are kept in `out/latents.pt`, with the autoencoder in `out/vae`.

    Returns:
        (count, 4, 9, 16, 16) float16, mean 0 and standard deviation 1 per channel.
    """
    vae.save_pretrained(out / "vae")
    latents = gathered(encode_clips, out / "vae", out, count, device, processes)
    channels = latents.transpose(0, 1).flatten(1).float()
    mean, std = channels.mean(1), channels.std(1)
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    vae.save_pretrained(out / "vae")
    shape = (-1, 1, 1, 1)
    latents = latents.sub_(mean.view(shape).half()).div_(std.view(shape).half())
    torch.save({"latents": latents}, out / "latents.pt")
    return latents


def draw_clips(recipe: ClipRecipe, step: int, latents: Tensor, clips: list[Clip], still: bool) -> tuple[Tensor, ...]:
    """Clean latents (n, 4, frames, 16, 16), noise, sigmas (n,), token ids (n, 32): a function of (seed, step) alone.

    Clips run forwards or backwards. still: single frames, more of them, with captions that tell of no motion.
    """
    rng = scene_rng(recipe.seed + 400, step)
    count = recipe.batch * (recipe.still_batch if still else 1)
    chosen = rng.integers(0, len(clips), count)
    drawn = torch.from_numpy(chosen)
    if still:
        frames = rng.integers(0, FRAMES, count)
        clean = latents[drawn, :, torch.from_numpy(frames), None].float()
        captions = [training_caption(clips[i].scene(int(f)), rng) for i, f in zip(chosen, frames, strict=True)]
    else:
        back = torch.from_numpy(rng.random(count) < 0.5)
        clean = latents[drawn].float()
        clean = torch.where(back.view(-1, 1, 1, 1, 1), clean.flip(2), clean)
        turned = [clips[i].backwards() if b else clips[i] for i, b in zip(chosen, back.tolist(), strict=True)]
        captions = [clip_caption(clip, rng) for clip in turned]
    noise, sigmas = draw_noise(recipe, step, clean)
    if not still:
        sigmas = recipe.shift * sigmas / (1 + (recipe.shift - 1) * sigmas)
    return clean, noise, sigmas, encode_captions(captions, "video")


class ClipVelocity(nn.Module):
    """The transformer with the frozen text encoder, called as the pipeline calls them."""

    def __init__(self, transformer: WanTransformer3DModel, text: CLIPTextModel) -> None:
        super().__init__()
        self.transformer, self.text = transformer, text.requires_grad_(False)

    def forward(self, noisy: Tensor, sigmas: Tensor, ids: Tensor) -> Tensor:
        """Predicted velocity, noise - latents, like the noisy latents (n, 4, frames, 16, 16); ids: (n, 32)."""
        return self.transformer(
            hidden_states=noisy,
            timestep=1000 * sigmas,
            encoder_hidden_states=text_states(self.text, ids),
            return_dict=False,
        )[0]


@torch.no_grad()
def text_states(text: CLIPTextModel, ids: Tensor) -> Tensor:
    """The text encoder's states (n, 32, 128) with zeros after the end of each text, where Wan pipelines put them."""
    states = text(input_ids=ids).last_hidden_state
    ended = (ids == text.config.eos_token_id).cumsum(1)
    # The first end-of-text token belongs to the text; those that pad it do not.
    return states * (ended <= 1)[..., None]


def train_clips(
    text: CLIPTextModel,
    latents: Tensor,
    out: Path,
    budget: Budget,
    recipe: ClipRecipe,
    device: str = "cpu",
    resume: bool = False,
    crew: Crew = SOLO,
) -> WanTransformer3DModel:
    """Train the transformer to predict the velocity; checkpoint in `out/transformer.pt`.

    Args:
        text: the text encoder with the words of motion, which stays as it is.
        latents: (clips, 4, 9, 16, 16) of the first clips of the world.
        out, budget, recipe, device, resume, crew: as in `train_denoiser`.

    Returns:
        The averaged model, in evaluation mode.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    transformer = models_video.transformer().to(device).train()
    direct_heads(transformer)
    average = Average({"transformer": transformer}, recipe.ema)
    muon, adamw = optimisers(transformer, recipe.matrix_lr, recipe.lr)
    state: dict[str, Any] = {"transformer": transformer, "average": average, "muon": muon, "adamw": adamw}
    stage = Stage(out / "transformer.pt", budget, state, crew)
    if resume:
        stage.resume()
    velocity = ClipVelocity(transformer, text.to(device).eval())
    clips = [world_clip(i) for i in range(len(latents))]

    def draw(step: int) -> tuple[Tensor, ...]:
        return draw_clips(recipe, step, latents, clips, still=stage.progress < recipe.stills)

    fit_velocity(stage, velocity, draw, average, [(muon, recipe.matrix_lr), (adamw, recipe.lr)], recipe, device)
    average.copy_to({"transformer": transformer})
    return transformer.eval()
