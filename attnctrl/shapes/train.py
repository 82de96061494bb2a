"""Train a shapes model from nothing to a saved pipeline, by one command."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel

from attnctrl.errors import ControlError

from . import models
from .budget import Budget
from .crew import SOLO, Crew, run_crew
from .ema import Average
from .pretrained import assemble, weights_path
from .tokenizer import load_tokenizer
from .train_autoencoder import AutoencoderRecipe, psnr, refine_decoder, train_autoencoder
from .train_denoiser import DenoiserRecipe, encode_world, scene_latents, train_denoiser
from .train_text import TextRecipe, train_text_encoder
from .train_transformer import TransformerRecipe, train_transformer

SHARES = {
    "sd": {"autoencoder": 0.19, "text": 0.02, "denoiser": 0.71, "decoder": 0.08},
    "dit": {"transformer": 1.0},
}
"""Each model's stages with their parts of `--minutes`; encoding the training scenes (some minutes) comes on top."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `attnctrl train-shapes`."""
    parser.add_argument("name", choices=tuple(SHARES), help="which shapes model to train")
    parser.add_argument("--out", type=Path, required=True, help="working directory; the pipeline goes to OUT/pipeline")
    parser.add_argument(
        "--minutes",
        type=float,
        nargs="+",
        default=[80.0],
        help=f"in all, or one number for each stage of sd ({', '.join(SHARES['sd'])})",
    )
    parser.add_argument(
        "--steps",
        type=int,
        nargs="+",
        metavar="N",
        help="steps of each stage instead of minutes; reproducible",
    )
    parser.add_argument("--scenes", type=int, help="how many scenes the last model learns from")
    parser.add_argument("--batch", type=int, help="batch of the denoiser or transformer; a multiple of --processes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument(
        "--processes", type=int, choices=(1, 2, 4), help="processes sharing the work on a cpu; default: as it has cores"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="dit: train through torch.compile, a sixth faster")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoints in OUT")


def budgets(name: str, minutes: list[float], steps: list[int] | None) -> dict[str, Budget]:
    """One budget for each stage of the model `name`.

    Raises:
        ValueError: steps does not give one number per stage, or minutes neither that nor one number; or a number below
            1 (steps) or 0 (minutes).
    """
    shares = SHARES[name]
    if steps is None and len(minutes) == 1:
        minutes = [minutes[0] * share for share in shares.values()]
    given = minutes if steps is None else steps
    if len(given) != len(shares):
        raise ValueError(f"{name} has {len(shares)} stages ({', '.join(shares)}), but {len(given)} numbers were given")
    unit, least = ("minutes", 0) if steps is None else ("steps", 1)
    if min(given) < least:
        raise ValueError(f"{min(given):g} {unit} were given: give {least} or more")
    if steps is not None:
        return {stage: Budget(steps=n) for stage, n in zip(shares, steps, strict=True)}
    return {stage: Budget(minutes=m) for stage, m in zip(shares, minutes, strict=True)}


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
    saved = torch.load(out / "denoiser.pt", map_location="cpu", weights_only=True)
    average = Average(modules, 0.0)
    average.load_state_dict(saved["state"]["average"])
    average.copy_to(modules)
    return modules["unet"].eval(), modules["text"].eval(), saved["step"]


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
    saved = torch.load(out / "transformer.pt", map_location="cpu", weights_only=True)
    average = Average({"transformer": transformer}, 0.0)
    average.load_state_dict(saved["state"]["average"])
    average.copy_to({"transformer": transformer})
    transformer.to(torch.float16).save_pretrained(path / "transformer", safe_serialization=True)
    models.flow_scheduler().save_pretrained(path / "scheduler")
    assemble(transformer, models.flow_scheduler()).save_config(path)
    return saved["step"]


def _autoencoder_stage(
    crew: Crew, out: Path, budget: Budget, recipe: AutoencoderRecipe, device: str, resume: bool
) -> None:
    train_autoencoder(out, budget, recipe, device, resume, crew)


def _text_stage(crew: Crew, out: Path, budget: Budget, recipe: TextRecipe, device: str, resume: bool) -> None:
    text = train_text_encoder(out, budget, recipe, device, resume, crew)
    if crew.rank == 0:
        torch.save({k: v.cpu() for k, v in text.state_dict().items()}, out / "text_encoder.pt")


def _denoiser_stage(crew: Crew, out: Path, budget: Budget, recipe: DenoiserRecipe, device: str, resume: bool) -> None:
    text = text_encoder()
    text.load_state_dict(torch.load(out / "text_encoder.pt", weights_only=True))
    latents = torch.load(out / "latents.pt", weights_only=True)["latents"]
    train_denoiser(text, latents, out, budget, recipe, device, resume, crew)


def _transformer_stage(
    crew: Crew, out: Path, budget: Budget, recipe: TransformerRecipe, device: str, resume: bool
) -> None:
    text = CLIPTextModel.from_pretrained(weights_path("sd") / "text_encoder").float()
    latents = torch.load(out / "latents.pt", weights_only=True)["latents"]
    train_transformer(text, latents, out, budget, recipe, device, resume, crew)


def _decoder_stage(crew: Crew, out: Path, budget: Budget, recipe: AutoencoderRecipe, device: str, resume: bool) -> None:
    refine_decoder(AutoencoderTiny.from_pretrained(out / "vae"), out, budget, recipe, device, resume, crew)


def load_vae(checkpoint: Path) -> AutoencoderTiny:
    """The autoencoder in a checkpoint of an autoencoder or decoder stage."""
    vae = models.autoencoder()
    vae.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["state"]["vae"])
    return vae.eval()


def main(args: argparse.Namespace) -> int:
    """Run every stage that is not finished yet; 0 on success. Raises ControlError for bad numbers."""
    try:
        budget = budgets(args.name, args.minutes, args.steps)
    except ValueError as error:
        raise ControlError(f"{error}.") from None
    # Denormal numbers slow a CPU down; the setting belongs to the whole process, so it is put back.
    torch.set_flush_denormal(True)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        {"sd": _train_sd, "dit": _train_dit}[args.name](args, budget)
        return 0
    finally:
        torch.set_flush_denormal(False)


def _processes(args: argparse.Namespace) -> int:
    if args.device != "cpu":
        return 1
    return args.processes or max(n for n in (1, 2, 4) if n <= (os.cpu_count() or 1))


def _run(processes: int, out: Path, stage: Callable[..., None], *work: Any) -> None:
    if processes > 1:
        run_crew(processes, stage, work, out / "meeting")
    else:
        stage(SOLO, *work)


def _train_sd(args: argparse.Namespace, budget: dict[str, Budget]) -> None:
    out, device, resume, processes = args.out, args.device, args.resume, _processes(args)
    cuda = device != "cpu"
    images = AutoencoderRecipe(seed=args.seed, images=16 if cuda else 4)
    batch = args.batch or (128 if cuda else 16)
    noise = DenoiserRecipe(seed=args.seed, batch=batch, scenes=args.scenes or DenoiserRecipe.scenes)
    _run(processes, out, _autoencoder_stage, out, budget["autoencoder"], images, device, resume)
    vae = load_vae(out / "autoencoder.pt")
    print(f"autoencoder: {psnr(vae, 24):.2f} dB", flush=True)
    if not (resume and (out / "latents.pt").exists()):
        encode_world(vae, out, noise.scenes, device, processes)
    _run(processes, out, _text_stage, out, budget["text"], TextRecipe(seed=args.seed), device, resume)
    _run(processes, out, _denoiser_stage, out, budget["denoiser"], noise, device, resume)
    _run(processes, out, _decoder_stage, out, budget["decoder"], images, device, resume)
    print(f"autoencoder after decoder refinement: {psnr(load_vae(out / 'decoder.pt'), 24):.2f} dB", flush=True)
    export(out, out / "pipeline")


def _train_dit(args: argparse.Namespace, budget: dict[str, Budget]) -> None:
    """On the autoencoder and the text encoder that ship with `sd`."""
    out, resume, processes = args.out, args.resume, _processes(args)
    batch = args.batch or (256 if args.device != "cpu" else TransformerRecipe.batch)
    recipe = TransformerRecipe(seed=args.seed, batch=batch, compiled=args.compile)
    if not (resume and (out / "latents.pt").exists()):
        count = args.scenes or DenoiserRecipe.scenes
        latents = scene_latents(weights_path("sd") / "vae", out, count, args.device, processes)
        torch.save({"latents": latents.half()}, out / "latents.pt")
    _run(processes, out, _transformer_stage, out, budget["transformer"], recipe, args.device, resume)
    export_transformer(out, out / "pipeline")


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(_parser)
    raise SystemExit(main(_parser.parse_args()))
