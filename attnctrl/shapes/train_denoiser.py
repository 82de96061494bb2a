"""Third stage of training: latents of many scenes, then denoiser and text encoder together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextModel

from . import models
from .budget import Budget, Stage, learning_rate
from .captions import training_caption
from .crew import SOLO, Crew, run
from .ema import Average
from .render import render
from .tokenizer import encode_captions
from .train_autoencoder import fast_bfloat16
from .world import Scene, sample_scene, scene_rng

SCENES_SEED = 1


@dataclass(frozen=True)
class DenoiserRecipe:
    """Settings of `encode_world` and `train_denoiser`."""

    scenes: int = 24_000
    batch: int = 16
    lr: float = 6e-4
    warmup: int = 200
    flat: float = 0.3
    ema: float = 0.9985
    snr_cap: float = 5.0
    seed: int = 0


def world_scene(index: int) -> Scene:
    """Training scene `index`: trained pairs only, one to three things."""
    return sample_scene(scene_rng(SCENES_SEED, index))


def encode_scenes(crew: Crew, vae_path: Path, part: Path, count: int, device: str, chunk: int = 32) -> None:
    """Write this process's chunks of latents to `part` with its rank appended: {first index: (n, 4, 16, 16)}."""
    vae = AutoencoderTiny.from_pretrained(vae_path).to(device, memory_format=torch.channels_last)
    parts: dict[int, Tensor] = {}
    starts = range(chunk * crew.rank, count, chunk * crew.size)
    for start in tqdm(starts, desc="latents", mininterval=10, disable=crew.rank > 0):
        scenes = [world_scene(i) for i in range(start, min(start + chunk, count))]
        image = render(scenes, models.IMAGE_SIZE, scene_rng(SCENES_SEED + 1, start)) * 2 - 1
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=fast_bfloat16(device)):
            image = image.to(device, memory_format=torch.channels_last)
            parts[start] = vae.encode(image).latents.float().cpu()
    torch.save(parts, f"{part}{crew.rank}")


def scene_latents(vae_path: Path, out: Path, count: int, device: str = "cpu", processes: int = 1) -> Tensor:
    """Latents of the first `count` training scenes under the autoencoder saved at `vae_path`: (count, 4, 16, 16)."""
    return gathered(encode_scenes, vae_path, out, count, device, processes)


def gathered(encode: Callable[..., None], vae_path: Path, out: Path, count: int, device: str, processes: int) -> Tensor:
    """What `encode(crew, vae_path, part, count, device)` writes, of all processes and in order: (count, ...).

    encode: a module-level function that saves {first index: latents} to `part` with its rank appended.
    """
    part = out / "latents.part"
    run(processes, out, encode, vae_path, part, count, device)
    parts: dict[int, Tensor] = {}
    for rank in range(processes):
        parts |= torch.load(f"{part}{rank}", weights_only=True)
        Path(f"{part}{rank}").unlink()
    return torch.cat([parts[start] for start in sorted(parts)])


def encode_world(vae: AutoencoderTiny, out: Path, count: int, device: str = "cpu", processes: int = 1) -> Tensor:
    """Latents of the first `count` training scenes, whitened; the whitening is folded into `vae` in place.

    Results are kept in `out/latents.pt`, with the whitened autoencoder in `out/vae`.

    Returns:
        (count, 4, 16, 16) float16, mean 0 and standard deviation 1 per channel.
    """
    vae.save_pretrained(out / "vae_raw")
    latents = scene_latents(out / "vae_raw", out, count, device, processes)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    vae = vae.cpu()
    models.fold_whitening(vae, mean, std)
    latents = ((latents - mean[:, None, None]) / std[:, None, None]).half()
    vae.save_pretrained(out / "vae")
    torch.save({"latents": latents, "mean": mean, "std": std}, out / "latents.pt")
    return latents


def draw_noise(recipe: DenoiserRecipe, step: int, clean: Tensor) -> tuple[Tensor, Tensor]:
    """Noise like `clean`, (n, ...), and timesteps (n,): a function of (seed, step) alone.

    Timesteps are stratified: one uniform draw in each n-th of the schedule, which makes the loss less noisy.
    """
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    noise = torch.randn(clean.shape, generator=generator)
    strata = (torch.arange(len(clean)) + torch.rand(len(clean), generator=generator)) / len(clean)
    return noise, (strata * 1000).long().clamp(max=999)


def draw_batch(recipe: DenoiserRecipe, step: int, latents: Tensor, scenes: list[Scene]) -> tuple[Tensor, ...]:
    """Clean latents (n, 4, 16, 16), noise, timesteps (n,), token ids (n, 32): a function of (seed, step) alone."""
    rng = scene_rng(recipe.seed + 100, step)
    chosen = rng.integers(0, len(scenes), recipe.batch)
    ids = encode_captions([training_caption(scenes[i], rng) for i in chosen])
    clean = latents[torch.from_numpy(chosen)].float()
    return clean, *draw_noise(recipe, step, clean), ids


class Pair(nn.Module):
    """Denoiser and text encoder as one module, so that one wrapper can average gradients over processes."""

    def __init__(self, unet: UNet2DConditionModel, text: CLIPTextModel) -> None:
        super().__init__()
        self.unet, self.text = unet, text

    def forward(self, noisy: Tensor, steps: Tensor, ids: Tensor) -> Tensor:
        """Predicted noise (n, 4, 16, 16) from noisy latents, timesteps (n,) and token ids (n, 32)."""
        condition = self.text(input_ids=ids).last_hidden_state
        return self.unet(noisy, steps, condition, return_dict=False)[0]


def train_denoiser(
    text: CLIPTextModel,
    latents: Tensor,
    out: Path,
    budget: Budget,
    recipe: DenoiserRecipe,
    device: str = "cpu",
    resume: bool = False,
    crew: Crew = SOLO,
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Train denoiser and text encoder to predict noise; checkpoint in `out/denoiser.pt`.

    Args:
        text: where the text encoder starts; trained in place.
        latents: (scenes, 4, 16, 16) from `encode_world`.
        out, budget, device, resume: as in the other stages.
        recipe: settings; loss weights are min(snr, snr_cap) / snr.
        crew: the processes that share each batch; every one of them calls this function alike.

    Returns:
        The averaged models, in evaluation mode.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    unet = models.denoiser().to(device, memory_format=torch.channels_last).train()
    text = text.to(device).train()
    # On CPUs the fused attention's backward pass is slower than plain products at 64 to 256 tokens.
    unet.set_attn_processor(AttnProcessor() if device == "cpu" else AttnProcessor2_0())
    modules = {"unet": unet, "text": text}
    average = Average(modules, recipe.ema)
    parameters = [p for m in modules.values() for p in m.parameters()]
    optimiser = torch.optim.AdamW(parameters, recipe.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    stage = Stage(out / "denoiser.pt", budget, {**modules, "average": average, "optimiser": optimiser}, crew)
    if resume:
        stage.resume()
    scenes = [world_scene(i) for i in range(len(latents))]

    def draw(step: int) -> tuple[Tensor, ...]:
        return draw_batch(recipe, step, latents, scenes)

    fit_noise(stage, Pair(unet, text), draw, average, optimiser, recipe, device)
    average.copy_to(modules)
    return unet.eval(), text.eval()


def fit_noise(
    stage: Stage,
    module: nn.Module,
    draw: Callable[[int], tuple[Tensor, ...]],
    average: Average,
    optimiser: torch.optim.Optimizer,
    recipe: DenoiserRecipe,
    device: str,
) -> None:
    """Run `stage` to the end of its budget: min-SNR-weighted (predicted - noise)^2.

    module: from noisy latents, timesteps and what else `draw` gives to the predicted noise.
    draw: for a step, clean latents, noise, timesteps and what else `module` takes, each with the batch first.
    """
    model = stage.crew.wrap(module)
    parameters = [p for p in module.parameters() if p.requires_grad]
    alphas = models.scheduler().alphas_cumprod
    bar = stage.bar(stage.path.stem)
    smooth = None
    stage.start_clock()
    while stage.progress < 1:
        clean, noise, steps, *given = (stage.crew.share(t) for t in draw(stage.step))
        signal = alphas[steps][:, None, None, None]
        noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
        snr = (signal / (1 - signal)).flatten()
        weight = (snr.clamp(max=recipe.snr_cap) / snr).to(device)
        stage.set_rate(optimiser, learning_rate(recipe.lr, stage.progress, stage.step, recipe.warmup, recipe.flat))
        noisy = noisy.to(device, memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16, enabled=fast_bfloat16(device)):
            predicted = model(noisy, steps.to(device), *(t.to(device) for t in given))
        error = (predicted.float() - noise.to(device)).square().mean((1, 2, 3))
        optimiser.zero_grad(set_to_none=True)
        (weight * error).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        average.update()
        stage.advance()
        value = error.detach().mean().item()
        smooth = value if smooth is None else 0.99 * smooth + 0.01 * value
        bar.set_postfix(step=stage.step, eps_mse=f"{smooth:.4f}", refresh=False)
        bar.update(int(1000 * stage.progress) - bar.n)
    bar.close()
    stage.save()
