"""Train the video model from nothing to a saved pipeline: autoencoder, words of motion, latents, transformer."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanPipeline
from transformers import CLIPTextModel

from . import models_video
from .budget import Budget
from .crew import Crew, run
from .ema import take_average
from .pretrained import shipped_text_encoder
from .tokenizer import load_tokenizer
from .train_autoencoder import AutoencoderRecipe
from .train_clips import ClipRecipe, encode_world_clips, train_clips
from .train_frames import frame_psnr, load_frame_autoencoder, train_frame_autoencoder
from .train_words import WordsRecipe, train_motion_words

SHARES = {"autoencoder": 0.15, "words": 0.02, "transformer": 0.83}


def train_video(
    out: Path,
    budget: dict[str, Budget],
    images: AutoencoderRecipe,
    recipe: ClipRecipe,
    device: str,
    processes: int,
    resume: bool,
) -> None:
    """Run every stage that is not finished yet, one budget each; the pipeline goes to `out/pipeline`."""
    run(processes, out, _autoencoder_stage, out, budget["autoencoder"], images, device, resume)
    vae = load_frame_autoencoder(out / "autoencoder.pt")
    print(f"autoencoder: {frame_psnr(vae, 24):.2f} dB", flush=True)
    run(processes, out, _words_stage, out, budget["words"], WordsRecipe(seed=recipe.seed), device, resume)
    if not (resume and (out / "latents.pt").exists()):
        encode_world_clips(vae, out, recipe.clips, device, processes)
    run(processes, out, _transformer_stage, out, budget["transformer"], recipe, device, resume)
    export_video(out, out / "pipeline")


def _autoencoder_stage(
    crew: Crew, out: Path, budget: Budget, recipe: AutoencoderRecipe, device: str, resume: bool
) -> None:
    train_frame_autoencoder(out, budget, recipe, device, resume, crew)


def _words_stage(crew: Crew, out: Path, budget: Budget, recipe: WordsRecipe, device: str, resume: bool) -> None:
    text = train_motion_words(shipped_text_encoder(), out, budget, recipe, device, resume, crew)
    if crew.rank == 0:
        text.save_pretrained(out / "text_encoder")


def _transformer_stage(crew: Crew, out: Path, budget: Budget, recipe: ClipRecipe, device: str, resume: bool) -> None:
    text = CLIPTextModel.from_pretrained(out / "text_encoder").float()
    latents = torch.load(out / "latents.pt", weights_only=True)["latents"]
    train_clips(text, latents, out, budget, recipe, device, resume, crew)


def export_video(out: Path, path: Path) -> int:
    """Write the pipeline in float16 as it stands in `out` (training may be going on); returns the transformer's step.

    The text encoder is the shapes models' own with the words of motion.
    """
    transformer, vae = models_video.transformer(), AutoencoderKLWan.from_pretrained(out / "vae")
    step = take_average({"transformer": transformer}, out / "transformer.pt")
    vae.register_to_config(_name_or_path="")  # else the folder that it came from is written
    pipeline = WanPipeline(
        tokenizer=load_tokenizer("video"),
        text_encoder=CLIPTextModel.from_pretrained(out / "text_encoder").to(torch.float16),
        vae=vae.to(torch.float16),
        scheduler=models_video.scheduler(),
        transformer=transformer.to(torch.float16),
    )
    pipeline.save_pretrained(path, safe_serialization=True)
    return step
