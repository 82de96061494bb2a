"""`bench inversion`: given pictures drawn anew under their own prompt, beside the error that the autoencoder makes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from tqdm import tqdm

from attnctrl.bench.draw import Settings, precision
from attnctrl.bench.likeness import psnr
from attnctrl.bench.methods import NONE
from attnctrl.bench.results import Results, Row
from attnctrl.bench.stats import mean_interval
from attnctrl.bench.tasks import Task, make_tasks
from attnctrl.errors import ControlError
from attnctrl.inversion import inversion
from attnctrl.pipelines.editing import EditPipeline

TABLE = ("psnr", "round_trip", "to_round_trip")
IMAGES, QUICK_IMAGES = 8, 2
OBJECTS = (2,)
GUIDANCE, STEPS = 1.0, 50
"""An inversion by DDIM promises its picture at guidance 1."""
METHODS = "ddim,negative-prompt,direct,edit-friendly,virtual"
FLOW_METHODS = "rf,virtual"


def default_methods(pipe: Any) -> str:
    """The inversions that a pipeline's kind of model has; null-text has nothing to do without guidance."""
    return FLOW_METHODS if isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler) else METHODS


def parse_inversions(text: str) -> list[str]:
    """The inversions of a comma-separated list. Raises ControlError for unknown names."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        inversion(name)
    return names


def round_trip(pipe: Any, picture: Image.Image) -> np.ndarray:
    """What the autoencoder makes of a picture, (height, width, 3) in 0..1, as the pipeline would return it."""
    pixels = pipe.image_processor.preprocess(picture).to(pipe.vae.device, pipe.vae.dtype)
    with torch.no_grad():
        encoded = pipe.vae.encode(pixels)
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        decoded = pipe.vae.decode(latents).sample
    return unit(pipe.image_processor.postprocess(decoded, output_type="pil")[0])


def unit(picture: Image.Image) -> np.ndarray:
    """(height, width, 3) in 0..1."""
    return np.asarray(picture, dtype=np.float64) / 255


def score(given: np.ndarray, trip: np.ndarray, redrawn: np.ndarray) -> dict[str, float]:
    """In dB, pictures in 0..1: redrawn and given, the autoencoder's round trip and given, redrawn and round trip."""
    return {"psnr": psnr(redrawn, given), "round_trip": psnr(trip, given), "to_round_trip": psnr(redrawn, trip)}


def measure(
    pipe: Any, names: Sequence[str], objects: Sequence[int], images: int, settings: Settings, results: Results
) -> None:
    """Add a row for each inversion and number of objects that `results` does not hold yet."""
    missing = [(name, count) for count in objects for name in names if results.find(name, count) is None]
    with tqdm(total=images * len(missing), unit="img", smoothing=0.1) as bar:
        for name, count in missing:
            bar.set_description(name)
            tasks = make_tasks(count, images, settings.split, settings.seed)
            results.add(_row(pipe, name, count, tasks, settings, bar))


def _row(pipe: Any, name: str, count: int, tasks: list[Task], settings: Settings, bar: tqdm) -> Row:
    scores: list[dict[str, float]] = []
    seconds: list[float] = []
    for task in tasks:
        picture = Image.fromarray((task.ideal * 255).round().astype(np.uint8))
        start = time.perf_counter()
        try:
            with precision(pipe.device, settings.dtype):
                redrawn = EditPipeline(pipe)(
                    picture,
                    task.prompt,
                    task.prompt,
                    method=NONE,
                    inversion=name,
                    num_inference_steps=settings.steps,
                    guidance=settings.guidance,
                    seed=task.seed,
                    record=False,
                    **settings.call,
                ).images[0]
        except ControlError as error:
            return Row(name, count, 0, error=str(error))
        seconds.append(time.perf_counter() - start)
        scores.append(score(unit(picture), round_trip(pipe, picture), unit(redrawn)))
        bar.update()
    metrics = {metric: mean_interval([s[metric] for s in scores]) for metric in TABLE}
    return Row(name, count, len(tasks), metrics, statistics.median(seconds))
