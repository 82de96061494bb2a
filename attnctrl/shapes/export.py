"""From the checkpoints of a training to pipelines on disk."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel

from . import models
from .ema import take_average
from .pretrained import assemble, assemble_instruct
from .tokenizer import load_tokenizer


def save_pipeline(vae: AutoencoderTiny, unet: UNet2DConditionModel, text: CLIPTextModel, path: Path) -> None:
    """Write a StableDiffusionPipeline in float16 safetensors. The models given are left as they are."""
    parts = {"vae": models.autoencoder(), "unet": models.denoiser(), "text_encoder": text_encoder()}
    for part, trained in zip(parts.values(), (vae, unet, text), strict=True):
        part.load_state_dict({k: v.cpu() for k, v in trained.state_dict().items()})
        part.to(torch.float16)
    pipeline = StableDiffusionPipeline(
        **parts,
        tokenizer=load_tokenizer(),
        scheduler=models.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(path, safe_serialization=True)


def text_encoder() -> CLIPTextModel:
    """An untrained text encoder that fits the committed tokenizer."""
    tokenizer = load_tokenizer()
    return models.text_encoder(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)


def load_denoiser(out: Path) -> tuple[UNet2DConditionModel, CLIPTextModel, int]:
    """The averaged models of the denoiser checkpoint in `out`, finished or not, and its step."""
    modules = {"unet": models.denoiser(), "text": text_encoder()}
    step = take_average(modules, out / "denoiser.pt")
    return modules["unet"].eval(), modules["text"].eval(), step


def export(out: Path, path: Path) -> int:
    """Write the pipeline as it stands in the working directory `out` (training may be going on); returns the step."""
    vae = AutoencoderTiny.from_pretrained(out / "vae")
    if (out / "decoder.pt").exists():
        vae = load_vae(out / "decoder.pt")
    unet, text, step = load_denoiser(out)
    save_pipeline(vae, unet, text, path)
    return step


def export_transformer(out: Path, path: Path) -> int:
    """Write the transformer as it stands in `out`, with its scheduler and the pipeline's index; returns the step."""
    transformer = models.transformer()
    step = take_average({"transformer": transformer}, out / "transformer.pt")
    transformer.to(torch.float16).save_pretrained(path / "transformer", safe_serialization=True)
    models.flow_scheduler().save_pretrained(path / "scheduler")
    assemble(transformer, models.flow_scheduler()).save_config(path)
    return step


def export_instruct(out: Path, path: Path) -> int:
    """Write the denoiser of 8 channels as it stands in `out`, with scheduler and pipeline index; returns the step."""
    unet = models.denoiser(in_channels=2 * models.LATENT_CHANNELS)
    step = take_average({"unet": unet}, out / "instruct.pt")
    unet.to(torch.float16).save_pretrained(path / "unet", safe_serialization=True)
    models.scheduler().save_pretrained(path / "scheduler")
    assemble_instruct(unet, models.scheduler()).save_config(path)
    return step


def load_vae(checkpoint: Path) -> AutoencoderTiny:
    """The autoencoder in a checkpoint of an autoencoder or decoder stage."""
    vae = models.autoencoder()
    vae.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["state"]["vae"])
    return vae.eval()
