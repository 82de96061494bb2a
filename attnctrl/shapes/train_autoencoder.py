"""First and last stages of training: the autoencoder, and later its decoder alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn
from torch.nn import functional

from . import models
from .budget import Budget, Stage, learning_rate
from .crew import SOLO, Crew
from .render import coverage, render
from .world import Scene, sample_scene, scene_rng


@dataclass(frozen=True)
class AutoencoderRecipe:
    """Settings of `train_autoencoder` and `refine_decoder`.

    `images` full images cost as much as `4 * images` crops of half the side; steps alternate towards full images
    in the last `full_from` share of the budget.
    """

    images: int = 4
    crop: int = 64
    full_from: float = 0.75
    lr: float = 1.5e-3
    refine_lr: float = 8e-4
    warmup: int = 100
    latent_noise: float = 0.06
    whiteness: float = 0.01
    object_weight: float = 1.0
    edge_weight: float = 3.0
    seed: int = 0


# Small pointed shapes are what an autoencoder rounds off first, so it sees more of them.
_FINE_SHAPES = ("star", "cross", "diamond")


def practice_scene(rng: np.random.Generator) -> Scene:
    """A scene for autoencoder training: as `sample_scene`, but every pair occurs and fine shapes are often small."""
    scene = sample_scene(rng, held_out="any")
    things = []
    for thing in scene.things:
        shape = str(rng.choice(_FINE_SHAPES, p=(0.6, 0.2, 0.2))) if rng.random() < 0.25 else thing.shape
        small = rng.random() < (0.6 if shape in _FINE_SHAPES else 0.3)
        r = float(min(thing.r, rng.uniform(0.085, 0.125))) if small else thing.r
        things.append(type(thing)(shape, thing.colour, thing.cx, thing.cy, r))
    return Scene(tuple(things), scene.background)


def batch(recipe: AutoencoderRecipe, step: int, full: bool) -> tuple[Tensor, Tensor]:
    """Images in -1..1 (n, 3, side, side) and loss weights (n, 1, side, side), a function of (seed, step) alone."""
    rng = scene_rng(recipe.seed, step)
    count = recipe.images if full else 4 * recipe.images
    scenes = [practice_scene(rng) for _ in range(count)]
    image, cover = render(scenes, models.IMAGE_SIZE, rng), coverage(scenes, models.IMAGE_SIZE)[:, None]
    if not full:
        image, cover = _crops(image, cover, scenes, recipe.crop, rng)
    band = functional.max_pool2d(cover, 7, 1, 3) + functional.max_pool2d(-cover, 7, 1, 3)
    return image * 2 - 1, 1 + recipe.object_weight * cover + recipe.edge_weight * band


def _crops(
    image: Tensor, cover: Tensor, scenes: list[Scene], side: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """One crop per image, around a random thing of it, at a multiple of 8 pixels."""
    size, images, covers = image.shape[-1], [], []
    for i, scene in enumerate(scenes):
        thing = scene.things[int(rng.integers(len(scene.things)))]
        centre = np.array([thing.cy, thing.cx]) * size + rng.uniform(-side / 4, side / 4, 2) - side / 2
        y, x = (int(np.clip(round(v / 8) * 8, 0, size - side)) for v in centre)
        images.append(image[i, :, y : y + side, x : x + side])
        covers.append(cover[i, :, y : y + side, x : x + side])
    return torch.stack(images), torch.stack(covers)


def reconstruction_loss(output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted L1 + 2 MSE + 0.3 L1 of the image gradients; images (n, 3, h, w), weight (n, 1, h, w)."""
    difference = output - target
    loss = (weight * (difference.abs() + 2 * difference.square())).mean()
    dx, dy = difference.diff(dim=-1), difference.diff(dim=-2)
    return loss + 0.3 * ((weight[..., 1:] * dx.abs()).mean() + (weight[..., 1:, :] * dy.abs()).mean())


def _noise(recipe: AutoencoderRecipe, step: int, full: bool) -> Tensor:
    count, side = (recipe.images, models.IMAGE_SIZE) if full else (4 * recipe.images, recipe.crop)
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    return torch.randn(count, models.LATENT_CHANNELS, side // 8, side // 8, generator=generator)


def train_autoencoder(
    out: Path,
    budget: Budget,
    recipe: AutoencoderRecipe,
    device: str = "cpu",
    resume: bool = False,
    crew: Crew = SOLO,
) -> AutoencoderTiny:
    """Train the autoencoder from scratch; checkpoint in `out/autoencoder.pt`.

    Args:
        out: working directory, made if missing.
        budget: steps or minutes, the learning rate falling to 0 at its end.
        recipe: settings.
        device: where to compute.
        resume: continue from the checkpoint if there is one.
        crew: the processes that share each batch; every one of them calls this function alike.
    """
    torch.manual_seed(recipe.seed)
    vae = models.autoencoder().to(device, memory_format=torch.channels_last)
    coder = _Coder(vae, recipe.latent_noise)
    fit_autoencoder(vae, coder, recipe.lr, out / "autoencoder.pt", budget, recipe, device, resume, crew)
    return vae


def refine_decoder(
    vae: AutoencoderTiny,
    out: Path,
    budget: Budget,
    recipe: AutoencoderRecipe,
    device: str = "cpu",
    resume: bool = False,
    crew: Crew = SOLO,
) -> AutoencoderTiny:
    """Train the decoder on, with the encoder frozen, so that latents (and the denoiser) keep their meaning.

    Checkpoint in `out/decoder.pt`. Arguments as for `train_autoencoder`.
    """
    vae = vae.to(device, memory_format=torch.channels_last)
    vae.encoder.requires_grad_(False)
    shifted = replace(recipe, seed=recipe.seed + 1)
    coder = _Coder(vae, recipe.latent_noise)
    fit_autoencoder(vae, coder, recipe.refine_lr, out / "decoder.pt", budget, shifted, device, resume, crew)
    return vae


class _Coder(nn.Module):
    """Encoder, noise and decoder as one module, so that gradients can be averaged over processes."""

    def __init__(self, vae: AutoencoderTiny, latent_noise: float) -> None:
        super().__init__()
        self.vae, self.latent_noise = vae, latent_noise

    def forward(self, image: Tensor, noise: Tensor, true_decoder: bool) -> tuple[Tensor, Tensor]:
        z = self.vae.encoder(image)
        noisy = z + self.latent_noise * noise
        return z, self.vae.decoder(noisy) if true_decoder else models.fast_decode(self.vae.decoder, noisy)


def fit_autoencoder(
    vae: nn.Module,
    coder: nn.Module,
    peak: float,
    path: Path,
    budget: Budget,
    recipe: AutoencoderRecipe,
    device: str,
    resume: bool,
    crew: Crew,
) -> None:
    """Run a stage of an autoencoder to the end of its budget, with the learning rate `peak`; checkpoint at `path`.

    Args:
        vae: with parts `encoder`, frozen or not, and `decoder`; trained in place and left in evaluation mode.
        coder: (images, noise, true_decoder) to the latents and the pictures made of them with the noise added;
            true_decoder says that no short cut may be taken.
        budget, recipe, device, resume, crew: as in `train_autoencoder`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    parameters = [p for p in vae.parameters() if p.requires_grad]
    frozen_encoder = not next(vae.get_submodule("encoder").parameters()).requires_grad
    optimiser = torch.optim.AdamW(parameters, peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    stage = Stage(path, budget, {"vae": vae, "optimiser": optimiser}, crew)
    if resume:
        stage.resume()
    vae.train()
    model = crew.wrap(coder)
    bar = stage.bar(path.stem)
    stage.start_clock()
    while stage.progress < 1:
        full = stage.progress >= (recipe.full_from if not frozen_encoder else 0.3)
        image, weight = (crew.share(t).to(device) for t in batch(recipe, stage.step, full))
        image = image.contiguous(memory_format=torch.channels_last)
        stage.set_rate(optimiser, learning_rate(peak, stage.progress, stage.step, recipe.warmup))
        # The cheap decoder differs on the outermost ring of pixels, so the last part uses the real one.
        true_decoder = stage.progress >= (recipe.full_from + 1) / 2
        with torch.autocast(device, torch.bfloat16, enabled=fast_bfloat16(device)):
            z, output = model(image, crew.share(_noise(recipe, stage.step, full)).to(device), true_decoder)
        loss = reconstruction_loss(output.float(), image, weight)
        if not frozen_encoder:
            z = z.float()
            spread = z.mean((0, 2, 3)).square() + (z.std((0, 2, 3)) - 1).square()
            loss = loss + recipe.whiteness * spread.sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        stage.advance()
        if stage.step % 50 == 0:
            quality = -10 * torch.log10((output.detach().float() - image).square().mean() / 4)
            bar.set_postfix(step=stage.step, loss=f"{loss.item():.4f}", psnr=f"{quality.item():.1f}")
        bar.update(int(1000 * stage.progress) - bar.n)
    bar.close()
    stage.save()
    vae.eval()


def fast_bfloat16(device: str) -> bool:
    """Whether bfloat16 is faster than float32 on this device: on CPUs without native instructions it is not."""
    return device != "cpu" or bool(torch.cpu._is_avx512_bf16_supported())


def psnr(vae: AutoencoderTiny, count: int = 64, seed: int = 9) -> float:
    """Reconstruction quality in dB of an autoencoder; see `reconstruction_psnr`."""
    return reconstruction_psnr(lambda image: vae.decode(vae.encode(image).latents).sample, vae.device, count, seed)


def reconstruction_psnr(
    rebuilt: Callable[[Tensor], Tensor], device: torch.device, count: int = 64, seed: int = 9
) -> float:
    """Quality in dB (per-image mean squared error, averaged in dB) on `count` held-out training-like scenes.

    rebuilt: what becomes of images (n, 3, 128, 128) in -1..1.
    """
    scenes = [sample_scene(scene_rng(seed, i)) for i in range(count)]
    image = render(scenes, models.IMAGE_SIZE, scene_rng(seed, -1 % 2**32)) * 2 - 1
    with torch.no_grad():
        out = torch.cat([rebuilt(part) for part in image.to(device).split(16)])
    error = (out.clamp(-1, 1).cpu() - image).square().mean((1, 2, 3)) / 4
    return float((-10 * error.log10()).mean())
