"""A video with sparse attention: Wan 2.1, Wan 2.2 or HunyuanVideo, from the hub or a folder.

    python demos/sparse_video.py --model wan2.1 --method radial --prompt "a cat walks in the grass" --out cat.mp4
    python demos/sparse_video.py --model hunyuan --method draft --height 720 --width 1280 --frames 129
    python demos/sparse_video.py --model wan2.1 --method paro --plan plan.safetensors   # calibrates where there is none
    python demos/sparse_video.py --model wan2.1-i2v --method radial --image cat.png

Prints what was visited where, and the seconds; --method none is the stock pipeline, to compare with. It needs a GPU,
and `pip install imageio[ffmpeg]` for the file. The small Wan 2.1: --path Wan-AI/Wan2.1-T2V-1.3B-Diffusers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
)
from diffusers.utils import export_to_video, load_image

import attnctrl as ac
from attnctrl.pipelines import calibrate_paro
from attnctrl.report import Report

LATENTS = ac.Where(kinds=("self", "joint"))


def load_wan(path: str, kind: Any = WanPipeline) -> Any:
    """Its autoencoder wants float32; 5 is the shift for 720p."""
    vae = AutoencoderKLWan.from_pretrained(path, subfolder="vae", torch_dtype=torch.float32)
    pipe = kind.from_pretrained(path, vae=vae, torch_dtype=torch.bfloat16)
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=5.0)
    return pipe


def load_wan_image(path: str) -> Any:
    return load_wan(path, WanImageToVideoPipeline)


def load_hunyuan(path: str) -> Any:
    bfloat16 = torch.bfloat16
    transformer = HunyuanVideoTransformer3DModel.from_pretrained(path, subfolder="transformer", torch_dtype=bfloat16)
    pipe = HunyuanVideoPipeline.from_pretrained(path, transformer=transformer, torch_dtype=torch.float16)
    pipe.vae.enable_tiling()
    return pipe


@dataclass(frozen=True)
class Model:
    """hub: where it is. call: the pipeline's arguments. methods: where the papers' settings are not the defaults."""

    hub: str
    load: Callable[[str], Any]
    call: dict[str, Any]
    fps: int
    methods: dict[str, ac.Control] = field(default_factory=dict)


METHODS: dict[str, ac.Control] = {
    "radial": ac.Radial(),
    "neighborhood-tiles": ac.NeighborhoodTiles(),
    "sliding-tile": ac.SlidingTile(),
    "draft": ac.Draft(),
    "rettention": ac.Rettention(density=0.1),
    "vmoba": ac.VMoBA(),
}
WAN = {"num_inference_steps": 50, "guidance_scale": 5.0}
MODELS = {
    "wan2.1": Model("Wan-AI/Wan2.1-T2V-14B-Diffusers", load_wan, WAN, 16),
    "wan2.1-i2v": Model("Wan-AI/Wan2.1-I2V-14B-720P-Diffusers", load_wan_image, WAN, 16),
    "wan2.2": Model(
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        load_wan,
        {"num_inference_steps": 40, "guidance_scale": 4.0, "guidance_scale_2": 3.0},
        16,
        {"radial": ac.Radial(decay=0.8, window=ac.Window(0.275, 1.0))},
    ),
    "hunyuan": Model(
        "hunyuanvideo-community/HunyuanVideo",
        load_hunyuan,
        {"num_inference_steps": 50},
        15,
        {
            "radial": ac.Radial(decay=0.95, sink=0, where=LATENTS),
            "neighborhood-tiles": ac.NeighborhoodTiles(extent=(18, 24, 24), stride=(16, 8, 8)),
            "sliding-tile": ac.SlidingTile(tile=(6, 8, 8), tiles=(3, 3, 3)),
            "draft": ac.Draft(density=0.1, where=replace(LATENTS, skip=2)),
        },
    ),
}


def control_for(model: str, method: str) -> ac.Control | None:
    """The method with the model's settings; None for the stock pipeline."""
    return None if method == "none" else MODELS[model].methods.get(method, METHODS[method])


def generate(pipe: Any, model: str, control: ac.Control | None, **call: Any) -> tuple[Any, Report]:
    """The pipeline's frames of one video, and the report of the run."""
    with ac.control(pipe, *([] if control is None else [control]), record=False) as run:
        frames = pipe(**{**MODELS[model].call, **call}).frames[0]
    return frames, run.report


def planned(pipe: Any, model: str, plan: Path, **call: Any) -> ac.Paro:
    """PAROAttention by the plan in a file, which a short run makes where there is none."""
    if not plan.exists():
        short = {**MODELS[model].call, **call, "num_inference_steps": 8, "output_type": "latent"}
        calibrate_paro(pipe, lambda: pipe(**short), density=0.3).save(plan)
    return ac.Paro(plan)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="wan2.1")
    parser.add_argument("--path", help="another hub id, or a folder, with a model of the same class")
    parser.add_argument("--method", choices=["none", *METHODS, "paro"], default="radial")
    parser.add_argument("--plan", type=Path, default=Path("paro.safetensors"))
    parser.add_argument("--prompt", default="a cat walks in the grass, realistic")
    parser.add_argument("--image", help="the first picture, for wan2.1-i2v")
    parser.add_argument("--height", type=int, default=720)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("video.mp4"))
    asked = parser.parse_args(arguments)
    if (asked.image is None) == asked.model.endswith("i2v"):
        parser.error("wan2.1-i2v, and no other model, starts from an --image")

    pipe = MODELS[asked.model].load(asked.path or MODELS[asked.model].hub)
    if torch.cuda.is_available():
        pipe.enable_model_cpu_offload()
    size = {"height": asked.height, "width": asked.width, "num_frames": asked.frames}
    call = {"prompt": asked.prompt, **size}
    if asked.image is not None:
        call["image"] = load_image(asked.image).resize((asked.width, asked.height))
    if asked.method == "paro":
        control: ac.Control | None = planned(pipe, asked.model, asked.plan, **call)
    else:
        control = control_for(asked.model, asked.method)
    start = time.perf_counter()
    frames, report = generate(pipe, asked.model, control, generator=torch.Generator().manual_seed(asked.seed), **call)
    print(f"{time.perf_counter() - start:.1f} s\n{report}")
    export_to_video(frames, str(asked.out), fps=MODELS[asked.model].fps)


if __name__ == "__main__":
    main()
