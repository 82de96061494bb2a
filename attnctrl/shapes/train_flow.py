"""What trainings of diffusion transformers share: flow matching between noise and an autoencoder's latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from attnctrl.processors.packing import blocks_of_pictures, pictures_of_blocks

from . import models
from .budget import Stage
from .ema import Average
from .train_autoencoder import fast_bfloat16


@dataclass(frozen=True)
class FlowRecipe:
    """Settings of every flow matching.

    flat: the share of the budget after which the rates fall linearly to 0. compiled: run the blocks through
    torch.compile, a sixth faster on a CPU, which needs a C++ compiler there.
    """

    batch: int = 32
    warmup: int = 100
    flat: float = 0.45
    ema: float = 0.998
    seed: int = 0
    compiled: bool = False


def flow_rate(progress: float, step: int, recipe: FlowRecipe) -> float:
    """The factor of all learning rates: linear warm-up, 1 until `flat` of the budget, then linear to 0."""
    fall = min(1.0, (1 - progress) / (1 - recipe.flat))
    return min(1.0, (step + 1) / recipe.warmup) * fall


def draw_noise(recipe: FlowRecipe, step: int, clean: Tensor) -> tuple[Tensor, Tensor]:
    """Noise like `clean`, (n, ...), and sigmas (n,): a function of (seed, step) alone.

    Sigmas are logit-normal, sigmoid(N(0, 1)), as Stable Diffusion 3 recommends (arXiv 2403.03206).
    """
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    noise = torch.randn(clean.shape, generator=generator)
    return noise, torch.randn(len(clean), generator=generator).sigmoid()


class Velocity(nn.Module):
    """The transformer with the frozen text encoder, on unpacked latents."""

    def __init__(self, transformer: FluxTransformer2DModel, text: CLIPTextModel) -> None:
        super().__init__()
        self.transformer, self.text = transformer, text.requires_grad_(False)
        side = models.LATENT_SIZE // 2
        self.grid = (1, side, side)
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
        self.register_buffer("places", places.float(), persistent=False)

    def forward(
        self, noisy: Tensor, sigmas: Tensor, ids: Tensor, entities: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Predicted velocity, noise - latents, from noisy latents, both (n, 4, 16, 16).

        ids: (n, tokens) of the captions. entities: (n, blocks, tokens) of texts to be encoded alone and to stand
        behind the caption. mask: bool (n, 1, all tokens, all tokens), what sees what.
        """
        with torch.no_grad():
            text = self.text(input_ids=ids)
            states = text.last_hidden_state
            if entities is not None:
                alone = self.text(input_ids=entities.flatten(0, 1)).last_hidden_state
                states = torch.cat([states, alone.view(len(ids), -1, alone.shape[-1])], dim=1)
        output = self.transformer(
            hidden_states=blocks_of_pictures(noisy),
            timestep=sigmas,
            encoder_hidden_states=states,
            pooled_projections=text.pooler_output,
            txt_ids=torch.zeros(states.shape[1], 3, device=ids.device),
            img_ids=self.places,
            joint_attention_kwargs=None if mask is None else {"attention_mask": mask},
            return_dict=False,
        )
        return pictures_of_blocks(output[0], self.grid)


def fit_velocity(
    stage: Stage,
    velocity: nn.Module,
    draw: Callable[[int], tuple[Tensor, ...]],
    average: Average,
    optimisers: Sequence[tuple[torch.optim.Optimizer, float]],
    recipe: FlowRecipe,
    device: str,
) -> None:
    """Run `stage` to the end of its budget: (velocity - (noise - latents))^2 by optimisers with their peak rates.

    velocity: with a part `transformer`; from noisy latents and sigmas to predictions like the latents.
    draw: for a step, clean latents, noise, sigmas and what else `velocity` takes, each with the batch first.
    """
    trained = [p for p in velocity.parameters() if p.requires_grad]
    if recipe.compiled:
        velocity.get_submodule("transformer").compile(dynamic=False)
    model = stage.crew.wrap(velocity)
    bar = stage.bar(stage.path.stem)
    smooth = None
    stage.start_clock()
    while stage.progress < 1:
        clean, noise, sigmas, *given = (stage.crew.share(t).to(device) for t in draw(stage.step))
        mix = sigmas.view(-1, *(1,) * (clean.ndim - 1))
        with torch.autocast(device, torch.bfloat16, enabled=fast_bfloat16(device)):
            predicted = model((1 - mix) * clean + mix * noise, sigmas, *given)
        loss = (predicted.float() - (noise - clean)).square().mean()
        for optimiser, rate in optimisers:
            stage.set_rate(optimiser, rate * flow_rate(stage.progress, stage.step, recipe))
            optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimiser, _ in optimisers:
            optimiser.step()
        average.update()
        stage.advance()
        value = loss.item()
        smooth = value if smooth is None else 0.99 * smooth + 0.01 * value
        bar.set_postfix(step=stage.step, loss=f"{smooth:.4f}", refresh=False)
        bar.update(int(1000 * stage.progress) - bar.n)
    bar.close()
    stage.save()
