"""Training of a LoRA for entities: EliGen's masks on the joint-attention model, whose own weights stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from attnctrl.controls.layout.eligen import entity_groups
from attnctrl.controls.layout.entities import Places
from attnctrl.layout import Layout
from attnctrl.processors.joint import after_text
from attnctrl.regions import Region

from . import models
from .budget import Budget, Stage
from .captions import P_EMPTY, phrase, training_caption
from .crew import SOLO, Crew
from .ema import Average
from .layouts import SIDES, Box
from .tokenizer import encode_captions
from .train_denoiser import world_scene
from .train_flow import FlowRecipe, Velocity, draw_noise, fit_velocity
from .world import TRAIN_COUNTS, Scene, Thing, scene_rng

ADAPTER = "entities"
BLOCKS = max(TRAIN_COUNTS)
# Everything linear in the blocks but their modulations; the model's last layer is called `proj_out` too.
TARGETS = (
    r".*transformer_blocks\.\d+\."
    r"(attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)|ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out)"
)


@dataclass(frozen=True)
class EntityRecipe(FlowRecipe):
    """Settings of `train_entities`.

    rank: of every layer's two matrices; 32 is the most that keeps the file in float16 under 2 MB. dropped: share of
    samples without entities, those with an empty caption among them, so that guidance has its unconditional branch.
    entity_tokens: text tokens of each entity; "a red circle" has 5 with its start and end.
    """

    warmup: int = 50
    ema: float = 0.995
    lr: float = 1e-3
    rank: int = 32
    dropped: float = 0.25
    entity_tokens: int = 8


def loose_box(thing: Thing, ratio: float) -> Box:
    """The box of width / height `ratio` about a thing's centre in which it is the largest that fits, cut by the image.

    Benchmarks draw the sides of boxes at random, while shapes have proportions of their own: one side touches.
    """
    x0, y0, x1, y1 = thing.box
    half_w, half_h = (x1 - x0) / 2, (y1 - y0) / 2
    half_w, half_h = max(half_w, half_h * ratio), max(half_h, half_w / ratio)
    cx, cy = thing.cx, thing.cy
    # Cut on both sides alike: the thing stays in the middle.
    half_w, half_h = min(half_w, cx, 1 - cx), min(half_h, cy, 1 - cy)
    return cx - half_w, cy - half_h, cx + half_w, cy + half_h


def entities_of(scene: Scene, rng: np.random.Generator) -> list[Region]:
    """Every thing of a scene, named, in a box as loose as the benchmarks' are."""
    sides = rng.uniform(*SIDES, (len(scene.things), 2))
    boxes = [loose_box(thing, float(w / h)) for thing, (w, h) in zip(scene.things, sides, strict=True)]
    return [Region(phrase(t.shape, t.colour), box=box) for t, box in zip(scene.things, boxes, strict=True)]


def entity_inputs(regions: Sequence[Sequence[Region]], tokens: int) -> tuple[Tensor, Tensor]:
    """What the transformer is given for the entities of each sample: token ids (n, 3, tokens) and EliGen's mask.

    The mask is bool (n, 1, s, s) over s = 32 caption tokens, three blocks of `tokens` and 64 latents; blocks without
    a region are hidden.

    Raises:
        ValueError: a sample has more than three regions.
    """
    if max(map(len, regions)) > BLOCKS:
        raise ValueError(f"a sample has {max(map(len, regions))} entities: there are {BLOCKS} blocks for them.")
    texts = [[r.text for r in rs] + [""] * (BLOCKS - len(rs)) for rs in regions]
    ids = encode_captions([text for row in texts for text in row])[:, :tokens]
    valid = torch.tensor([[bool(text) for text in row] for row in texts])
    none = torch.zeros(len(regions), BLOCKS, 0, dtype=torch.bool)
    layout = Layout([list(rs) for rs in regions], none, valid, 1, torch.device("cpu"))
    side = models.LATENT_SIZE // 2
    sequence = after_text(models.TEXT_LENGTH + BLOCKS * tokens, (1, side, side))
    mask = entity_groups(Places(layout, models.TEXT_LENGTH, sequence, sequence.latent.stop)).dense()
    # Hidden blocks would see nothing, and a softmax over nothing is not a number.
    return ids.view(len(regions), BLOCKS, -1), mask | torch.eye(mask.shape[-1], dtype=torch.bool)


def draw_entities(recipe: EntityRecipe, step: int, latents: Tensor, scenes: list[Scene]) -> tuple[Tensor, ...]:
    """Clean latents (n, 4, 16, 16), noise, sigmas (n,), caption ids (n, 32), entity ids and the mask.

    A function of (seed, step) alone.
    """
    rng = scene_rng(recipe.seed + 300, step)
    chosen = rng.integers(0, len(scenes), recipe.batch)
    captions = [training_caption(scenes[i], rng) for i in chosen]
    # Of the captioned samples, so many that `dropped` of all have none.
    share = max(0.0, recipe.dropped - P_EMPTY) / (1 - P_EMPTY)
    regions = [
        entities_of(scenes[i], rng) if caption and rng.random() >= share else []
        for i, caption in zip(chosen, captions, strict=True)
    ]
    clean = latents[torch.from_numpy(chosen)].float()
    noise, sigmas = draw_noise(recipe, step, clean)
    return clean, noise, sigmas, encode_captions(captions), *entity_inputs(regions, recipe.entity_tokens)


def add_lora(transformer: FluxTransformer2DModel, rank: int) -> nn.ParameterList:
    """Freeze the transformer and give it a LoRA that does nothing yet; its matrices."""
    from peft import LoraConfig

    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS), adapter_name=ADAPTER)
    return nn.ParameterList(p for p in transformer.parameters() if p.requires_grad)


def save_lora(transformer: FluxTransformer2DModel, path: Path) -> None:
    """Write the LoRA in float16, as `load_lora_weights` of a pipeline reads it."""
    from peft import get_peft_model_state_dict

    layers = get_peft_model_state_dict(transformer, adapter_name=ADAPTER)
    halved = {name: tensor.detach().cpu().half() for name, tensor in layers.items()}
    FluxPipeline.save_lora_weights(path, transformer_lora_layers=halved)


def train_entities(
    transformer: FluxTransformer2DModel,
    text: CLIPTextModel,
    latents: Tensor,
    out: Path,
    budget: Budget,
    recipe: EntityRecipe,
    device: str = "cpu",
    resume: bool = False,
    crew: Crew = SOLO,
) -> FluxTransformer2DModel:
    """Train the LoRA; checkpoint in `out/entities.pt`, which holds nothing of the base.

    Args:
        transformer: the base, trained; it is given the LoRA in place.
        text: the text encoder, which stays as it is.
        latents: (scenes, 4, 16, 16) of the first scenes of the world.
        out, budget, recipe, device, resume, crew: as in `train_denoiser`.

    Returns:
        The transformer with the averaged LoRA, in evaluation mode.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    transformer = transformer.to(device).train()
    lora = add_lora(transformer, recipe.rank).to(device)
    average = Average({"lora": lora}, recipe.ema)
    adamw = torch.optim.AdamW(lora.parameters(), recipe.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    stage = Stage(out / "entities.pt", budget, {"lora": lora, "average": average, "adamw": adamw}, crew)
    if resume:
        stage.resume()
    velocity = Velocity(transformer, text.to(device).eval()).to(device)
    scenes = [world_scene(i) for i in range(len(latents))]

    def draw(step: int) -> tuple[Tensor, ...]:
        return draw_entities(recipe, step, latents, scenes)

    fit_velocity(stage, velocity, draw, average, [(adamw, recipe.lr)], recipe, device)
    average.copy_to({"lora": lora})
    return transformer.eval()
