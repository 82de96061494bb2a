"""Measure clips, of a pipeline, of an autoencoder or of the detector: `python -m attnctrl.shapes.measure_clips`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from torch import Tensor

from .captions_video import clip_prompt
from .detect import detect
from .frames import decode_frames, encode_frames
from .motion import Clip, sample_clip
from .pretrained import VIDEO_CALL, load
from .render import render_clip
from .score_clip import ClipScore, score_clip
from .world import scene_rng

TEST_SEED = 50
MEASURES = ("kept", "colour_kept", "moving", "axis", "jitter", "extra", "background")


def probe_clip(index: int, count: int | None = None) -> Clip:
    """Test clip `index`, with `count` things or one or two; training clips have another seed."""
    return sample_clip(scene_rng(TEST_SEED, index), count)


def rendered(index: int, clip: Clip) -> Tensor:
    """The frames of a test clip as they should be: (9, 3, 128, 128) in 0..1."""
    return render_clip(clip.scenes, rng=scene_rng(TEST_SEED + 1, index))


def rebuilt(vae: AutoencoderKLWan) -> Callable[[int, Clip], Tensor]:
    """The frames of a test clip as an autoencoder keeps them."""

    @torch.no_grad()
    def frames(index: int, clip: Clip) -> Tensor:
        decoded = decode_frames(vae, encode_frames(vae, rendered(index, clip).to(vae.device) * 2 - 1))
        return (decoded.clamp(-1, 1) + 1) / 2

    return frames


def drawn(pipeline: WanPipeline, steps: int, guidance: float) -> Callable[[int, Clip], Tensor]:
    """The frames that a pipeline draws for a test clip's canonical prompt, from noise seeded by its index."""
    pipeline.set_progress_bar_config(disable=True)

    def frames(index: int, clip: Clip) -> Tensor:
        prompt, _ = clip_prompt(clip.asked, clip.background)
        noise = torch.Generator().manual_seed(index)
        given = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": noise, **VIDEO_CALL}
        return pipeline(prompt, output_type="pt", **given).frames[0]

    return frames


def measure(frames: Callable[[int, Clip], Tensor], clips: int, count: int | None = None) -> list[ClipScore]:
    """Scores of the first `clips` test clips of `count` things.

    frames: from a test clip's index and itself to pictures (9, 3, h, w) in 0..1.
    """
    scores = []
    for index in range(clips):
        clip = probe_clip(index, count)
        scores.append(score_clip(clip.asked, [detect(frame) for frame in frames(index, clip)], clip.background))
    return scores


def summary(scores: Sequence[ClipScore]) -> str:
    """The mean of every measure, over the clips that have it."""
    means = []
    for name in MEASURES:
        values = [value for score in scores if (value := getattr(score, name)) is not None]
        means.append(f"{name} {np.mean(values):.4f}" if values else f"{name} -")
    return f"{len(scores)} clips: {', '.join(means)}"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("renders", "autoencoder", "pipeline"))
    parser.add_argument(
        "--base", type=Path, metavar="DIR", help="the folder of a video pipeline; default: the shipped one"
    )
    parser.add_argument("--clips", type=int, default=50)
    parser.add_argument("--things", type=int, choices=(1, 2), help="in each clip; default: either")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    frames: Callable[[int, Clip], Tensor] = rendered
    if args.what != "renders":
        pipeline = WanPipeline.from_pretrained(args.base) if args.base else load("video")
        pipeline.to(args.device)
        frames = rebuilt(pipeline.vae) if args.what == "autoencoder" else drawn(pipeline, args.steps, args.guidance)
    print(summary(measure(frames, args.clips, args.things)))


if __name__ == "__main__":
    main()
