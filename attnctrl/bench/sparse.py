"""`bench sparse`: videos with less attention, beside those with all of it from the same seeds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from attnctrl.bench.likeness import psnr, ssim
from attnctrl.bench.methods import NONE
from attnctrl.bench.results import CHANGE, Results, Row
from attnctrl.bench.sparse_ways import NAMES, make
from attnctrl.bench.stats import bootstrap_mean, mean_interval
from attnctrl.control import Control
from attnctrl.errors import ControlError
from attnctrl.kernels import probabilities
from attnctrl.models import call_arguments
from attnctrl.run import control
from attnctrl.sampling import Sampling
from attnctrl.shapes import VIDEO_CALL
from attnctrl.shapes.captions_video import clip_prompt
from attnctrl.shapes.detect import detect
from attnctrl.shapes.measure_clips import MEASURES, probe_clip
from attnctrl.shapes.motion import Clip
from attnctrl.shapes.score_clip import score_clip
from attnctrl.sites import Call

COMPARED = ("kept", "colour_kept", "moving", "axis")
"""What the detector says of objects, colours and directions."""
TABLE = ("visited", "recall", "psnr", "ssim", *COMPARED, "jitter")
IMAGES, QUICK_IMAGES = 16, 1
DENSITIES = (1.0, 0.5, 0.3, 0.2, 0.1)
CALIBRATION = 8
"""Clips that PARO's plan is made from. On four others it holds .73 of the attention's mass, one from 2 clips .71."""
EVERY = 6
"""In every so many steps the mass of attention in what is visited is measured."""
STATEFUL = ("rettention",)
"""What a second call of the same layer and step would disturb."""


@dataclass(frozen=True)
class Recall(Control):
    """A sparse control that also says how much of the full attention's mass its visited keys hold.

    Small models only: it asks for the control's attention to the identity, which is its matrix.
    """

    inner: Control = field(default_factory=Control)
    found: dict[str, list[float]] = field(default_factory=dict, compare=False)

    def begin(self, sampling: Sampling) -> Any:
        return self.inner.begin(sampling)

    def attend(self, call: Call, state: Any) -> torch.Tensor | None:
        if call.step.index % EVERY == 1 and call.branch == "cond":
            count = call.key.shape[2]
            identity = torch.eye(count, device=call.key.device).expand(*call.key.shape[:2], -1, -1)
            matrix = self.inner.attend(call.change(value=identity.to(call.value.dtype)), state)
            if matrix is not None:
                whole = probabilities(call.query, call.key, call.mask, call.scale)
                mass = (whole * (matrix > 0)).sum(dim=-1).mean()
                self.found.setdefault(call.site.name, []).append(float(mass))
        return self.inner.attend(call, state)


@dataclass(frozen=True)
class Drawn:
    """pictures: (frames, height, width, 3) in 0..1."""

    pictures: np.ndarray
    seconds: float


def draw(pipe: Any, clip: Clip, index: int, steps: int, guidance: float) -> Drawn:
    """One clip's canonical prompt from noise seeded by its index."""
    prompt, _ = clip_prompt(clip.asked, clip.background)
    given = {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(index), **VIDEO_CALL}
    start = time.perf_counter()
    frames = pipe(**call_arguments(pipe, prompt, guidance, {**given, "output_type": "np"})).frames[0]
    return Drawn(np.asarray(frames), time.perf_counter() - start)


def scores(clip: Clip, drawn: Drawn, dense: Drawn) -> dict[str, float]:
    """Every measure of one clip; `jitter` only where an object is seen often enough."""
    found = score_clip(clip.asked, [detect(frame) for frame in drawn.pictures], clip.background)
    given = {name: getattr(found, name) for name in MEASURES}
    like = {"psnr": psnr(drawn.pictures, dense.pictures), "ssim": ssim(drawn.pictures, dense.pictures)}
    return {name: float(value) for name, value in {**like, **given}.items() if value is not None}


def measure(
    pipe: Any,
    names: Sequence[str],
    densities: Sequence[float],
    clips: int,
    steps: int,
    guidance: float,
    block: int,
    results: Results,
) -> None:
    """Add the dense row and one for each method and density that `results` does not hold yet."""
    tasks = [probe_clip(index) for index in range(clips)]
    with tqdm(total=clips * (1 + len(names) * len(densities)), unit="clip", smoothing=0.1) as bar:
        bar.set_description("dense")
        dense = []
        for index, clip in enumerate(tasks):
            dense.append(draw(pipe, clip, index, steps, guidance))
            bar.update()
        if results.find(NONE, 0) is None:
            results.add(_row(NONE, [scores(c, d, d) for c, d in zip(tasks, dense, strict=True)], dense, {}))
        for density in densities:
            for name in names:
                label = f"{name}@{density:g}"
                bar.set_description(label)
                if results.find(label, 0) is None:
                    results.add(_measured(pipe, name, label, density, tasks, dense, steps, guidance, block))
                bar.update(clips)


def _measured(
    pipe: Any,
    name: str,
    label: str,
    density: float,
    tasks: Sequence[Clip],
    dense: Sequence[Drawn],
    steps: int,
    guidance: float,
    block: int,
) -> Row:
    grid = latent_grid(pipe)
    try:
        # The calibration sees prompts that are not measured.
        others = range(len(tasks), len(tasks) + CALIBRATION)
        made = make(
            name, density, grid, pipe, lambda: [draw(pipe, probe_clip(i), i, 8, guidance) for i in others], block
        )
        found, drawn, visited, recall = [], [], [], dict[str, list[float]]()
        for index, (clip, whole) in enumerate(zip(tasks, dense, strict=True)):
            with control(pipe, made, record=False) as run:
                drawn.append(draw(pipe, clip, index, steps, guidance))
            visited.append(run.report.visited())
            found.append(scores(clip, drawn[-1], whole))
        if name not in STATEFUL:
            same = {f: getattr(made, f) for f in ("window", "where", "branches")}
            with control(pipe, Recall(inner=made, found=recall, **same), record=False):
                draw(pipe, tasks[0], 0, steps, guidance)
    except ControlError as error:
        return Row(label, 0, 0, error=str(error))
    by_layer = {site: float(np.mean(masses)) for site, masses in recall.items()}
    row = [{**one, "visited": share} for one, share in zip(found, visited, strict=True)]
    for one, clip, whole in zip(row, tasks, dense, strict=True):
        before = scores(clip, whole, whole)
        one |= {metric + CHANGE: one[metric] - before[metric] for metric in COMPARED}
    if by_layer:
        row = [{**one, "recall": float(np.mean(list(by_layer.values())))} for one in row]
    return _row(label, row, drawn, {"recall_by_layer": by_layer} if by_layer else {})


def _row(label: str, found: Sequence[dict[str, float]], drawn: Sequence[Drawn], more: dict[str, Any]) -> Row:
    names = dict.fromkeys(name for one in found for name in one)
    metrics = {}
    for name in names:
        # A change of 0 or 1 is no proportion.
        interval = bootstrap_mean if name.endswith(CHANGE) else mean_interval
        metrics[name] = interval([one[name] for one in found if name in one])
    seconds = float(np.median([one.seconds for one in drawn]))
    return Row(label, 0, len(found), metrics, seconds, more=more)


def latent_grid(pipe: Any) -> tuple[int, int, int]:
    """The latents' (frames, height, width) in tokens of what `VIDEO_CALL` asks for."""
    config, side = pipe.transformer.config, pipe.vae_scale_factor_spatial
    _, height, width = config.patch_size
    return VIDEO_CALL["num_frames"] + 1, VIDEO_CALL["height"] // side // height, VIDEO_CALL["width"] // side // width


def parse_densities(text: str) -> tuple[float, ...]:
    """Densities from a comma-separated list. Raises ControlError for those outside 0 (without) to 1."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(0 < value <= 1 for value in values):
        raise ControlError(f'densities "{text}": give numbers above 0 and at most 1, such as 0.3,0.1.')
    return values


DEFAULT_METHODS = ",".join(NAMES)
