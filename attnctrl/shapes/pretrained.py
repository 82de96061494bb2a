"""Loading the models that ship with the package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from attnctrl.errors import ControlError

from .motion import FRAMES

if TYPE_CHECKING:
    from diffusers import (
        DiffusionPipeline,
        FluxPipeline,
        FluxTransformer2DModel,
        SchedulerMixin,
        StableDiffusionInstructPix2PixPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel

_WEIGHTS = Path(__file__).parent / "weights"
LORA = "pytorch_lora_weights.safetensors"
VIDEO_CALL: dict[str, Any] = {"height": 128, "width": 128, "num_frames": FRAMES - 1, "max_sequence_length": 32}
"""What a call of the pipeline "video" is to be given, for the size it was trained on.

`num_frames` is one less than what comes out: where an autoencoder keeps every frame, WanPipeline adds one, and says so.
"""


def weights_path(name: str = "sd") -> Path:
    """The folder of a shipped model, which `from_pretrained` takes like any other, or of a LoRA, "model+lora".

    Raises:
        ControlError: there is no shapes model of this name; the message lists those there are.
    """
    folders = {p.parent.name: p.parent for p in sorted(_WEIGHTS.glob("*/model_index.json"))}
    folders |= {f"{p.parent.parent.name}+{p.parent.name}": p.parent for p in sorted(_WEIGHTS.glob(f"*/*/{LORA}"))}
    if name not in folders:
        raise ControlError(f"unknown shapes model {name!r}; known: {', '.join(folders) or 'none'}.")
    return folders[name]


def load(
    name: str = "sd",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    folder: str | Path | None = None,
) -> DiffusionPipeline:
    """A shipped shapes model as a stock pipeline for 128x128 images, or clips.

    Args:
        name: "sd" is a Stable Diffusion in miniature (DDIM, no safety checker). "dit" is a FLUX in miniature
            (rectified flow); it shares the text encoder and the autoencoder of "sd", and its calls want
            `max_sequence_length=32`, the length of the text it was trained on, and for guidance `true_cfg_scale` with
            `negative_prompt=""`; `LayoutPipeline` and the commands see to both. "dit+entities" is the same with the
            LoRA that EliGen's masks were trained with, for `EliGen(regions, entity_tokens=8)`; `disable_lora()` and
            `enable_lora()` of the pipeline switch it. "video" is a Wan in miniature, of moving shapes: 9 frames, called
            with `**VIDEO_CALL`; its text encoder is that of "sd" with further words. "instruct" is an InstructPix2Pix
            in miniature: `pipe(instruction_for([("red circle", "blue circle")]), image=picture)`; it shares the text
            encoder and the autoencoder of "sd".
        dtype: of the weights once loaded; they are stored in float16.
        device: where to put them.
        folder: of a model of this kind that was trained by `attnctrl train-shapes`, its OUT/pipeline, in place of the
            shipped one.

    Raises:
        ControlError: the name is unknown, or a LoRA is asked for and peft is not installed.
    """
    from diffusers import (
        DDIMScheduler,
        FlowMatchEulerDiscreteScheduler,
        FluxTransformer2DModel,
        StableDiffusionPipeline,
        UNet2DConditionModel,
        WanPipeline,
    )

    model, plus, lora = name.partition("+")
    path = weights_path(model) if folder is None else Path(folder)
    # Converted here rather than by from_pretrained, whose argument for it changed its name.
    if name == "sd":
        return StableDiffusionPipeline.from_pretrained(path, local_files_only=True).to(device, dtype)
    if name == "video":
        return WanPipeline.from_pretrained(path, local_files_only=True).to(device, dtype)
    if name == "instruct":
        scheduler = DDIMScheduler.from_pretrained(path / "scheduler")
        unet = UNet2DConditionModel.from_pretrained(path / "unet", local_files_only=True)
        return assemble_instruct(unet, scheduler).to(device, dtype)
    adapter = weights_path(name) if plus else None
    transformer = FluxTransformer2DModel.from_pretrained(path / "transformer")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(path / "scheduler")
    pipeline = assemble(transformer, scheduler)
    if adapter is not None:
        need_peft(f"the shapes model {name!r}")
        pipeline.load_lora_weights(adapter, weight_name=LORA, adapter_name=lora)
    return pipeline.to(device, dtype)


def shipped_text_encoder() -> CLIPTextModel:
    """The text encoder of "sd" in float32."""
    from transformers import CLIPTextModel

    return CLIPTextModel.from_pretrained(weights_path("sd") / "text_encoder").float()


def shipped_denoiser() -> UNet2DConditionModel:
    """The denoiser of "sd" in float32."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(weights_path("sd") / "unet").float()


def need_peft(what: str) -> None:
    """Raises ControlError where peft, which diffusers needs for every LoRA, is not installed."""
    if find_spec("peft") is None:
        raise ControlError(f"{what} needs peft: pip install 'attnctrl[lora]'.")


def assemble(transformer: FluxTransformer2DModel, scheduler: SchedulerMixin) -> FluxPipeline:
    """The joint-attention pipeline around a transformer: the one text encoder gives both kinds of text."""
    from diffusers import FluxPipeline

    base = load("sd")
    pipeline = FluxPipeline(
        transformer=transformer,
        scheduler=scheduler,
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        text_encoder_2=base.text_encoder,
        tokenizer_2=base.tokenizer,
    )
    # What the pipeline takes for its size, in latents, when none is given; FLUX.1's is 128.
    pipeline.default_sample_size = base.unet.config.sample_size
    return pipeline


def assemble_instruct(unet: UNet2DConditionModel, scheduler: SchedulerMixin) -> StableDiffusionInstructPix2PixPipeline:
    """The instruction-following pipeline around a denoiser of 8 input channels."""
    from diffusers import StableDiffusionInstructPix2PixPipeline

    base = load("sd")
    return StableDiffusionInstructPix2PixPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
