"""Train a shapes model from nothing to a saved pipeline, by one command."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import AutoencoderTiny, FluxTransformer2DModel

from attnctrl.errors import ControlError

from .budget import Budget
from .crew import Crew, run
from .export import export, export_instruct, export_transformer, load_vae, text_encoder
from .pretrained import need_peft, shipped_denoiser, shipped_text_encoder, weights_path
from .train_autoencoder import AutoencoderRecipe, psnr, refine_decoder, train_autoencoder
from .train_clips import ClipRecipe
from .train_denoiser import DenoiserRecipe, encode_world, gathered, scene_latents, train_denoiser
from .train_entities import EntityRecipe, save_lora, train_entities
from .train_flow import FlowRecipe
from .train_instruct import InstructRecipe, encode_changes, train_instruct
from .train_text import TextRecipe, train_text_encoder
from .train_transformer import TransformerRecipe, train_transformer
from .train_video import SHARES as VIDEO_SHARES
from .train_video import train_video

Recipe = TypeVar("Recipe", bound=FlowRecipe)

SHARES = {
    "sd": {"autoencoder": 0.19, "text": 0.02, "denoiser": 0.71, "decoder": 0.08},
    "instruct": {"instruct": 1.0},
    "dit": {"transformer": 1.0},
    "entities": {"entities": 1.0},
    "video": VIDEO_SHARES,
}
"""Each model's stages with their parts of `--minutes`; encoding the scenes or clips (some minutes) comes on top."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `attnctrl train-shapes`."""
    parser.add_argument("name", choices=tuple(SHARES), help="which shapes model to train; entities: a LoRA of dit")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="working directory; the pipeline goes to OUT/pipeline, a LoRA to OUT/lora",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        nargs="+",
        default=[80.0],
        help="in all, or one number for each stage ("
        + "; ".join(f"{name}: {', '.join(stages)}" for name, stages in SHARES.items() if len(stages) > 1)
        + ")",
    )
    parser.add_argument(
        "--steps",
        type=int,
        nargs="+",
        metavar="N",
        help="steps of each stage instead of minutes; reproducible",
    )
    parser.add_argument("--scenes", type=int, help="how many scenes, changes or clips the last model learns from")
    parser.add_argument("--batch", type=int, help="batch of the denoiser or transformer; a multiple of --processes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument(
        "--processes", type=int, choices=(1, 2, 4), help="processes sharing the work on a cpu; default: as it has cores"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--compile", action="store_true", help="dit, entities, video: train through torch.compile, a sixth faster"
    )
    parser.add_argument(
        "--base", type=Path, metavar="DIR", help="entities: the folder of the dit pipeline; default: the shipped one"
    )
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoints in OUT")


def budgets(name: str, minutes: list[float], steps: list[int] | None) -> dict[str, Budget]:
    """One budget for each stage of the model `name`.

    Raises:
        ControlError: steps does not give one number per stage, or minutes neither that nor one number; or a number
            below 1 (steps) or 0 (minutes).
    """
    shares = SHARES[name]
    if steps is None and len(minutes) == 1:
        minutes = [minutes[0] * share for share in shares.values()]
    given = minutes if steps is None else steps
    if len(given) != len(shares):
        raise ControlError(
            f"{name} has {len(shares)} stages ({', '.join(shares)}), but {len(given)} numbers were given."
        )
    unit, least = ("minutes", 0) if steps is None else ("steps", 1)
    if min(given) < least:
        raise ControlError(f"{min(given):g} {unit} were given: give {least} or more.")
    if steps is not None:
        return {stage: Budget(steps=n) for stage, n in zip(shares, steps, strict=True)}
    return {stage: Budget(minutes=m) for stage, m in zip(shares, minutes, strict=True)}


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


def _instruct_stage(crew: Crew, out: Path, budget: Budget, recipe: InstructRecipe, device: str, resume: bool) -> None:
    latents = torch.load(out / "latents.pt", weights_only=True)["latents"]
    train_instruct(shipped_denoiser(), shipped_text_encoder(), latents, out, budget, recipe, device, resume, crew)


def _transformer_stage(
    crew: Crew, out: Path, budget: Budget, recipe: TransformerRecipe, device: str, resume: bool
) -> None:
    latents = torch.load(out / "latents.pt", weights_only=True)["latents"]
    train_transformer(shipped_text_encoder(), latents, out, budget, recipe, device, resume, crew)


def _entities_stage(
    crew: Crew, out: Path, base: Path, budget: Budget, recipe: EntityRecipe, device: str, resume: bool
) -> None:
    transformer = FluxTransformer2DModel.from_pretrained(base / "transformer").float()
    latents = torch.load(out / "latents.pt", weights_only=True)["latents"]
    train_entities(transformer, shipped_text_encoder(), latents, out, budget, recipe, device, resume, crew)
    if crew.rank == 0:
        save_lora(transformer, out / "lora")


def _decoder_stage(crew: Crew, out: Path, budget: Budget, recipe: AutoencoderRecipe, device: str, resume: bool) -> None:
    refine_decoder(AutoencoderTiny.from_pretrained(out / "vae"), out, budget, recipe, device, resume, crew)


def main(args: argparse.Namespace) -> int:
    """Run every stage that is not finished yet; 0 on success. Raises ControlError for bad numbers."""
    budget = budgets(args.name, args.minutes, args.steps)
    # Denormal numbers slow a CPU down; the setting belongs to the whole process, so it is put back.
    torch.set_flush_denormal(True)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        trainings = {
            "sd": _train_sd,
            "instruct": _train_instruct,
            "dit": _train_dit,
            "entities": _train_entities,
            "video": _train_video,
        }
        trainings[args.name](args, budget)
        return 0
    finally:
        torch.set_flush_denormal(False)


def _processes(args: argparse.Namespace) -> int:
    if args.device != "cpu":
        return 1
    return args.processes or max(n for n in (1, 2, 4) if n <= (os.cpu_count() or 1))


def _train_sd(args: argparse.Namespace, budget: dict[str, Budget]) -> None:
    out, device, resume, processes = args.out, args.device, args.resume, _processes(args)
    cuda = device != "cpu"
    images = AutoencoderRecipe(seed=args.seed, images=16 if cuda else 4)
    batch = args.batch or (128 if cuda else 16)
    noise = DenoiserRecipe(seed=args.seed, batch=batch, scenes=args.scenes or DenoiserRecipe.scenes)
    run(processes, out, _autoencoder_stage, out, budget["autoencoder"], images, device, resume)
    vae = load_vae(out / "autoencoder.pt")
    print(f"autoencoder: {psnr(vae, 24):.2f} dB", flush=True)
    if not (resume and (out / "latents.pt").exists()):
        encode_world(vae, out, noise.scenes, device, processes)
    run(processes, out, _text_stage, out, budget["text"], TextRecipe(seed=args.seed), device, resume)
    run(processes, out, _denoiser_stage, out, budget["denoiser"], noise, device, resume)
    run(processes, out, _decoder_stage, out, budget["decoder"], images, device, resume)
    print(f"autoencoder after decoder refinement: {psnr(load_vae(out / 'decoder.pt'), 24):.2f} dB", flush=True)
    export(out, out / "pipeline")


def _train_instruct(args: argparse.Namespace, budget: dict[str, Budget]) -> None:
    """On the denoiser, the autoencoder and the text encoder that ship with `sd`."""
    batch = args.batch or (128 if args.device != "cpu" else InstructRecipe.batch)
    recipe = InstructRecipe(seed=args.seed, batch=batch, scenes=args.scenes or InstructRecipe.scenes)
    if not (args.resume and (args.out / "latents.pt").exists()):
        vae = weights_path("sd") / "vae"
        latents = gathered(encode_changes, vae, args.out, recipe.scenes, args.device, _processes(args))
        torch.save({"latents": latents.half()}, args.out / "latents.pt")
    run(_processes(args), args.out, _instruct_stage, args.out, budget["instruct"], recipe, args.device, args.resume)
    export_instruct(args.out, args.out / "pipeline")


def _train_dit(args: argparse.Namespace, budget: dict[str, Budget]) -> None:
    """On the autoencoder and the text encoder that ship with `sd`."""
    recipe = _flow_recipe(args, TransformerRecipe, 256)
    _encode_scenes(args)
    work = (args.out, budget["transformer"], recipe, args.device, args.resume)
    run(_processes(args), args.out, _transformer_stage, *work)
    export_transformer(args.out, args.out / "pipeline")


def _train_entities(args: argparse.Namespace, budget: dict[str, Budget]) -> None:
    """On `dit`, shipped or given."""
    need_peft("train-shapes entities")
    base = args.base or weights_path("dit")
    if not (base / "transformer" / "config.json").exists():
        raise ControlError(f"--base {base} holds no transformer: give the folder of a dit pipeline.")
    recipe = _flow_recipe(args, EntityRecipe, 128)
    _encode_scenes(args)
    work = (args.out, base, budget["entities"], recipe, args.device, args.resume)
    run(_processes(args), args.out, _entities_stage, *work)


def _train_video(args: argparse.Namespace, budget: dict[str, Budget]) -> None:
    """On the text encoder that ships with `sd`."""
    recipe = _flow_recipe(args, ClipRecipe, 64)
    recipe = replace(recipe, clips=args.scenes or recipe.clips)
    images = AutoencoderRecipe(seed=args.seed, images=16 if args.device != "cpu" else 4)
    train_video(args.out, budget, images, recipe, args.device, _processes(args), args.resume)


def _flow_recipe(args: argparse.Namespace, recipe: type[Recipe], on_gpu: int) -> Recipe:
    """The recipe as the command line has it; on_gpu: the batch where there is one."""
    batch = args.batch or (on_gpu if args.device != "cpu" else recipe.batch)
    return recipe(seed=args.seed, batch=batch, compiled=args.compile)


def _encode_scenes(args: argparse.Namespace) -> None:
    """OUT/latents.pt: the training scenes under the shipped autoencoder."""
    if not (args.resume and (args.out / "latents.pt").exists()):
        count = args.scenes or DenoiserRecipe.scenes
        latents = scene_latents(weights_path("sd") / "vae", args.out, count, args.device, _processes(args))
        torch.save({"latents": latents.half()}, args.out / "latents.pt")


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(_parser)
    raise SystemExit(main(_parser.parse_args()))
