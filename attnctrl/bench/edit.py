"""`bench edit`: given pictures edited by every method, inversion and mask; what changed, and what did not.

On InstructPix2Pix the edits are told by instructions, and nothing is inverted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from tqdm import tqdm

from attnctrl.bench.draw import Settings, precision
from attnctrl.bench.edit_score import score_edit
from attnctrl.bench.edit_tasks import KINDS, EditTask, make_edits
from attnctrl.bench.edit_ways import Way, floor, parse_instruct_ways, parse_ways
from attnctrl.bench.methods import NONE
from attnctrl.bench.results import Results, Row
from attnctrl.bench.stats import mean_interval
from attnctrl.errors import ControlError
from attnctrl.pipelines.editing import EditPipeline
from attnctrl.pipelines.instruct import InstructPipeline
from attnctrl.processors import family_of
from attnctrl.shapes.instructions import GONE, instruction_for

TABLE = ("edited", "kept", "background_psnr", "max_error", "leak_in", "leak_out")
IMAGES, QUICK_IMAGES = 20, 2
METHODS = (
    "regenerate,img2img{strength=0.7|0.85},inpaint:mask,none@direct,none@edit-friendly,none@virtual,"
    "prompt-to-prompt@ddim,prompt-to-prompt@negative-prompt,prompt-to-prompt@direct,prompt-to-prompt@edit-friendly,"
    "prompt-to-prompt@virtual,mutual-self-attention@direct,mutual-self-attention@edit-friendly,plug-and-play@direct,"
    "semantic-protection@direct,inpaint-fusion@direct:mask,"
    "prompt-to-prompt@direct:mask,prompt-to-prompt@edit-friendly:mask,prompt-to-prompt@virtual:mask,"
    "ale-edit@direct:mask,ale-edit@edit-friendly:mask,ale-edit@virtual:mask,design-edit@direct:mask"
)
FLOW_METHODS = (
    "regenerate,img2img{strength=0.7|0.85},inpaint:mask,none@rf,none@virtual,mutual-self-attention@rf,"
    "mutual-self-attention@virtual,none@virtual:mask,design-edit@virtual:mask"
)
INSTRUCT_METHODS = (
    "none,focus-on-instruction,focus-on-instruction{modulate=false},focus-on-instruction{disentangle=false},"
    "focus-on-instruction{separate=true},focus-on-instruction:mask,lime,lime:mask"
)


def parse_kinds(text: str) -> tuple[str, ...]:
    """The kinds of edits of a comma-separated list. Raises ControlError for unknown ones."""
    kinds = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    unknown = [name for name in kinds if name not in KINDS]
    if unknown:
        raise ControlError(f'edits of the kind "{unknown[0]}" are not known: choose of {", ".join(KINDS)}.')
    return kinds


def instructed(pipe: Any) -> bool:
    """Whether a pipeline follows instructions."""
    return bool(getattr(family_of(pipe), "instructed", False))


def default_ways(pipe: Any) -> list[Way]:
    """The rows that a pipeline's kind of model has."""
    if instructed(pipe):
        return parse_instruct_ways(INSTRUCT_METHODS)
    return parse_ways(FLOW_METHODS if isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler) else METHODS)


def edit(pipe: Any, task: EditTask, way: Way, settings: Settings) -> Image.Image:
    """One edited picture. Raises ControlError where the method cannot make this edit."""
    takes_layers = way.spec is not None and any("layers" in part.method.settings for part in way.spec.parts)
    layers = task.layers if takes_layers and way.masked else ()
    if takes_layers and not layers:
        raise ControlError(f'"{way.label}" moves and removes what has a mask, and is not for this edit.')
    if task.moved and not takes_layers:
        raise ControlError(f'"{way.label}" cannot move an object.')
    if way.spec is None:
        return floor(pipe, task, way, settings)
    if way.inversion is None:
        return _instruct(pipe, task, way, settings)
    edits = task.edits if way.masked else tuple(replace(one, mask=None) for one in task.edits)
    controls = way.spec.controls({"edits": edits, "layers": layers})
    result = EditPipeline(pipe)(
        task.picture,
        task.layout.prompt,
        task.rest_prompt if takes_layers else task.target_prompt,
        edits=edits,
        layers=layers,
        method=controls or NONE,
        inversion=way.inversion,
        num_inference_steps=settings.steps,
        guidance=settings.guidance,
        seed=task.seed,
        record=False,
        **settings.call,
    )
    return result.images[0]


def _instruct(pipe: Any, task: EditTask, way: Way, settings: Settings) -> Image.Image:
    assert way.spec is not None
    parts = [(one.source, one.target or GONE) for one in task.edits]
    given: dict[str, Any] = {
        "phrases": [source for source, _ in parts],
        "instructions": [instruction_for([part]) for part in parts],
    }
    if way.masked:
        given |= {"masks": [one.mask for one in task.edits], "region": task.mask}
    result = InstructPipeline(pipe)(
        task.picture,
        instruction_for(parts),
        method=way.spec.controls(given) or NONE,
        mask=task.mask if way.masked else None,
        num_inference_steps=settings.steps,
        guidance=settings.guidance,
        seed=task.seed,
        record=False,
        **settings.call,
    )
    return result.images[0]


def measure(
    pipe: Any, ways: Sequence[Way], images: int, settings: Settings, results: Results, kinds: Sequence[str] = KINDS
) -> None:
    """Add a row for each way that `results` does not hold yet; kinds that a method refuses are said in the row."""
    missing = [way for way in ways if results.find(way.label, 0) is None]
    tasks = {kind: make_edits(kind, images, settings.split, settings.seed) for kind in kinds}
    with tqdm(total=images * len(kinds) * len(missing), unit="img", smoothing=0.1) as bar:
        for way in missing:
            bar.set_description(way.label)
            results.add(_row(pipe, way, tasks, settings, bar))


def _row(pipe: Any, way: Way, tasks: dict[str, list[EditTask]], settings: Settings, bar: tqdm) -> Row:
    scores: dict[str, list[dict[str, float]]] = {}
    seconds: list[float] = []
    refused: dict[str, str] = {}
    for kind, chosen in tasks.items():
        for task in chosen:
            start = time.perf_counter()
            try:
                with precision(pipe.device, settings.dtype):
                    picture = edit(pipe, task, way, settings)
            except ControlError as error:
                refused[kind] = str(error)
                break
            seconds.append(time.perf_counter() - start)
            scores.setdefault(kind, []).append(score_edit(task, np.asarray(picture, dtype=np.float64) / 255))
            bar.update()
    if not scores:
        return Row(way.label, 0, 0, error=next(iter(refused.values())))
    every = [s for found in scores.values() for s in found]
    names = dict.fromkeys(name for s in every for name in s)
    metrics = {name: mean_interval([s[name] for s in every if name in s]) for name in names}
    for kind, found in scores.items():
        metrics |= {f"{name}_{kind}": mean_interval([s[name] for s in found]) for name in ("edited", "kept")}
    more = {"refused": refused} if refused else {}
    return Row(way.label, 0, len(every), metrics, statistics.median(seconds), more=more)
