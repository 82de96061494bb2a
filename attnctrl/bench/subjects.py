"""`bench subjects`: prompts without colours, pictures that fix them; whose colour each object has, by every method."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from attnctrl.bench.draw import Settings, precision
from attnctrl.bench.memory import peak_bytes
from attnctrl.bench.methods import NONE, Spec, parse_methods, split_list, split_outside
from attnctrl.bench.results import Results, Row
from attnctrl.bench.stats import Estimate, mean_interval
from attnctrl.bench.subject_score import difference, score_subjects
from attnctrl.bench.subject_tasks import SubjectTask, make_subject_tasks
from attnctrl.controls.subjects.rows import reference_prompts
from attnctrl.errors import ControlError
from attnctrl.pipelines.subjects import WORDED, SubjectsPipeline, needs_rows
from attnctrl.regions import Region
from attnctrl.shapes.detect import detect
from attnctrl.words import words_for

TABLE = ("identity", "blend", "prompt", "in_box", "whole", "diversity", "memory")
IMAGES, QUICK_IMAGES = 20, 2
AGAIN = 4
"""So many pictures of a row are drawn from another noise too, for `diversity`."""
MEASURED_STEPS = 4
"""The steps of the run whose memory is measured: in all others the same tensors are made."""
OBJECTS = (2,)
PLAIN = "unmasked"
CONCATENATION = "consistent-self-attention{keep=1;early=1;late=1;window=0..1}"
"""What `unmasked` stands for: the keys of all references beside the picture's own, as they are."""
LAYOUT = "region-mask"
FLAGS = ("boxes", "found")
METHODS = ",".join(
    (
        NONE,
        PLAIN,
        "magic-face",
        "isolation-reposition",
        "appearance-matching",
        "consistent-self-attention",
        "shared-attention",
        f"{LAYOUT}:boxes",
        f"{LAYOUT}+magic-face:boxes",
        f"{LAYOUT}+magic-face{{placing=replace;window=0..0.5}}:boxes",
        f"{LAYOUT}+isolation-reposition:boxes",
        f"{LAYOUT}+appearance-matching:boxes",
        f"{LAYOUT}+masked-adain:boxes",
        f"{LAYOUT}+delayed-subject{{delay=0}}:boxes",
        f"{LAYOUT}+delayed-subject{{delay=0}}:boxes:found",
    )
)
"""By default the decoder's self-attention of ConsistentSelfAttention and SharedAttention sees references alone: a
batch holds one picture."""


@dataclass(frozen=True)
class Way:
    """One row: which methods, whether each subject's region is given, as methods of layout need it, and how words are
    come by, see `attnctrl.words`."""

    label: str
    spec: Spec
    boxes: bool = False
    words: str = "learned"


def parse_ways(text: str) -> list[Way]:
    """The rows of a comma-separated list: methods as `bench layout` writes them, `unmasked`, each with :boxes and
    :found, for found words rather than learned ones, or not.

    Raises ControlError for names that are not known.
    """
    ways = []
    for item in split_list(text):
        named, *flags = split_outside(item, ":")
        if unknown := set(flags) - set(FLAGS):
            raise ControlError(f"{item}: after a colon stands one of {', '.join(FLAGS)}, not {sorted(unknown)[0]!r}.")
        words = "found" if "found" in flags else "learned"
        for spec in parse_methods(CONCATENATION if named == PLAIN else named):
            label = ":".join((PLAIN if named == PLAIN else spec.label, *flags))
            ways.append(Way(label, spec, "boxes" in flags, words))
    return ways


def draw_subjects(pipe: Any, task: SubjectTask, way: Way, settings: Settings) -> Image.Image:
    """One picture. Raises ControlError where the method cannot draw it."""
    subjects = task.subjects(way.boxes)
    references: list[list[Region]] = [[] for _ in reference_prompts(subjects)]
    placed = [subject.placed for subject in subjects if subject.placed is not None]
    given: dict[str, Any] = {"subjects": subjects, "regions": [placed, *references]}
    if any(part.method.name in WORDED for part in way.spec.parts):
        words = words_for(pipe, subjects, way.words, seed=task.seed)
        given["embeddings"] = {phrase: word.embedding for phrase, word in words.items()}
    controls = way.spec.controls(given)
    if not needs_rows(controls):
        controls = way.spec.controls({**given, "regions": [placed]})
    result = SubjectsPipeline(pipe)(
        task.prompt,
        subjects if controls else (),
        method=controls or NONE,
        num_inference_steps=settings.steps,
        guidance=settings.guidance,
        seed=task.seed,
        record=False,
        **settings.call,
    )
    return result.images[0]


def measure(
    pipe: Any, ways: Sequence[Way], objects: Sequence[int], images: int, settings: Settings, results: Results
) -> None:
    """Add a row for each way and number of subjects that `results` does not hold yet."""
    missing = [(way, count) for count in objects for way in ways if results.find(way.label, count) is None]
    with tqdm(total=images * len(missing), unit="img", smoothing=0.1) as bar:
        for way, count in missing:
            bar.set_description(way.label)
            tasks = make_subject_tasks(count, images, settings.split, settings.seed)
            results.add(_row(pipe, way, count, tasks, settings, bar))


def _row(pipe: Any, way: Way, count: int, tasks: list[SubjectTask], settings: Settings, bar: tqdm) -> Row:
    """memory: in MB (10^6 bytes), the most that the tensors of one run hold at a time, references included."""
    scores: list[dict[str, float]] = []
    apart: list[float] = []
    seconds: list[float] = []
    try:
        with precision(pipe.device, settings.dtype):
            short = replace(settings, steps=min(settings.steps, MEASURED_STEPS))
            held = peak_bytes(pipe.device, lambda: draw_subjects(pipe, tasks[0], way, short)) / 1e6
            for task in tasks:
                start = time.perf_counter()
                picture = draw_subjects(pipe, task, way, settings)
                seconds.append(time.perf_counter() - start)
                scores.append(score_subjects(task, detect(np.asarray(picture))))
                if len(apart) < AGAIN:
                    other = draw_subjects(pipe, replace(task, seed=task.seed + 1), way, settings)
                    apart.append(difference(np.asarray(picture), np.asarray(other)))
                bar.update()
    except ControlError as error:
        return Row(way.label, count, 0, error=str(error))
    metrics = {name: mean_interval([s[name] for s in scores]) for name in scores[0]}
    metrics |= {"diversity": mean_interval(apart), "memory": Estimate(held, held, held)}
    return Row(way.label, count, len(tasks), metrics, statistics.median(seconds))
