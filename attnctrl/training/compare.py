"""The same fine-tuning with and without a loss on attention, same seeds: whether each subject keeps its own colour.

`python -m attnctrl.training.compare --json FILE`. Every way is trained once for each seed; its pipeline draws pictures
of two taught subjects, which `bench subjects`' scores judge. Half of them show two subjects that shared their scenes in
training, half two that never did.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attnctrl.bench.results import Results, Row, environment
from attnctrl.bench.stats import bootstrap_mean, mean_interval
from attnctrl.bench.subject_score import score_subjects
from attnctrl.bench.subject_tasks import SubjectTask
from attnctrl.bench.tables import markdown
from attnctrl.errors import ControlError
from attnctrl.shapes.detect import detect
from attnctrl.shapes.layouts import Layout
from attnctrl.shapes.world import BACKGROUNDS
from attnctrl.training.objectives import objective_of
from attnctrl.training.scenes import Taught, caption_of
from attnctrl.training.train import Recipe, train

TABLE = ("identity", "blend", "prompt", "whole")
EVERYWHERE = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class Asked:
    """A picture to be drawn. together: whether its subjects shared their scenes in training."""

    prompt: str
    task: SubjectTask
    together: bool


def asked_pictures(subjects: Sequence[Taught], count: int, seed: int) -> list[Asked]:
    """So many prompts of two subjects, of which every other one's never met in training."""
    rng = np.random.default_rng((seed, 8))
    made = []
    for i in range(count):
        together = i % 2 == 0 or len(subjects) == 2
        first = int(rng.integers(len(subjects)))
        others = [j for j in range(len(subjects)) if j != first and (j // 2 == first // 2) == together]
        pair = [subjects[first], subjects[others[int(rng.integers(len(others)))]]]
        background = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
        layout = Layout(tuple((s.shape, s.colour, EVERYWHERE) for s in pair), background)
        made.append(Asked(caption_of(pair, background), SubjectTask(layout, (), int(rng.integers(2**31))), together))
    return made


def score(pipe: Any, asked: Sequence[Asked], steps: int, batch: int = 8) -> list[dict[str, float]]:
    """Every measure of every picture, drawn by DDIM with guidance 3.5."""
    pipe.set_progress_bar_config(disable=True)
    scores = []
    for start in range(0, len(asked), batch):
        part = asked[start : start + batch]
        drawn = pipe(
            [one.prompt for one in part],
            num_inference_steps=steps,
            guidance_scale=3.5,
            generator=[torch.Generator().manual_seed(one.task.seed) for one in part],
        ).images
        judged = (score_subjects(one.task, detect(np.asarray(p))) for one, p in zip(part, drawn, strict=True))
        scores += [{name: value for name, value in one.items() if name in TABLE} for one in judged]
    return scores


def parse_ways(text: str) -> list[tuple[str, str, float | None]]:
    """From "none,localisation,localisation=1": the label, the loss and its weight, None for its own, of each.

    Raises ControlError for losses that are not known and weights that are no numbers.
    """
    ways = []
    for label in filter(None, (part.strip() for part in text.split(","))):
        name, equals, weight = label.partition("=")
        objective_of(name)
        try:
            ways.append((label, name, float(weight) if equals else None))
        except ValueError:
            raise ControlError(f'"{label}": write a loss, or a loss=weight.') from None
    return ways


def measure(ways: Sequence[tuple[str, str, float | None]], seeds: Sequence[int], images: int, results: Results) -> None:
    """Add a row for each way and seed that `results` does not hold yet, with the scores of every picture."""
    recipe = Recipe(**results.settings["recipe"])
    for seed in seeds:
        for label, loss, weight in ways:
            name = f"{label} seed {seed}"
            if results.find(name, 2) is not None:
                continue
            start = time.process_time()
            with tempfile.TemporaryDirectory() as folder:
                pipe, subjects = train(replace(recipe, loss=loss, weight=weight, seed=seed), Path(folder))
            trained = time.process_time() - start
            asked = asked_pictures(subjects, images, seed)
            scores = score(pipe, asked, results.settings["steps"])
            metrics = {m: mean_interval([s[m] for s in scores]) for m in TABLE}
            more = {
                "way": label,
                "seed": seed,
                "training_seconds": round(trained, 1),
                "together": [one.together for one in asked],
                "scores": {m: [s[m] for s in scores] for m in TABLE},
            }
            results.add(Row(name, 2, images, metrics, None, None, more))


def table(rows: Sequence[Row], metrics: Sequence[str] = TABLE) -> str:
    """Each way over all its seeds, and its difference from the first way, picture by picture, with 95% intervals.

    In three parts: all pictures, those of subjects that shared their training scenes, those of subjects that did not.
    """
    ways = list(dict.fromkeys(row.more["way"] for row in rows))
    base = {row.more["seed"]: row for row in rows if row.more["way"] == ways[0]}
    body = []
    for part, kept in (("all", (True, False)), ("together", (True,)), ("apart", (False,))):
        for way in ways:
            mine = [row for row in rows if row.more["way"] == way and row.more["seed"] in base]
            cells = []
            for metric in metrics:
                values, differences = [], []
                for row in mine:
                    own, others = row.more["scores"][metric], base[row.more["seed"]].more["scores"][metric]
                    chosen = [i for i, together in enumerate(row.more["together"]) if together in kept]
                    values += [own[i] for i in chosen]
                    differences += [own[i] - others[i] for i in chosen]
                cells.append(str(mean_interval(values)) if values else "-")
                if metric in metrics[:2]:
                    cells.append(str(bootstrap_mean(differences)) if values and way != ways[0] else "-")
            body.append([part, way, str(len(values)), *cells])
    head = ["pictures", "loss", "n"]
    for metric in metrics:
        head += [metric, f"{metric} less {ways[0]}'s"] if metric in metrics[:2] else [metric]
    return markdown(head, body)


def main(args: argparse.Namespace) -> int:
    """Train, draw, judge, print; 0 on success."""
    torch.set_flush_denormal(True)
    recipe = Recipe(steps=args.steps, batch=args.batch, scenes=args.scenes, subjects=args.subjects, alike=args.alike)
    varied = ("loss", "weight", "seed")
    kept = {name: value for name, value in asdict(recipe).items() if name not in varied}
    settings = {"recipe": kept, "steps": args.sampling_steps, "guidance": 3.5, "images": args.images}
    results = Results("training", "shapes-sd", settings, environment(torch.device("cpu"), "float32"), path=args.json)
    if args.json.exists():
        results.resume()
    seeds = [args.first_seed + i for i in range(args.seeds)]
    measure(parse_ways(args.ways), seeds, args.images, results)
    print(table(results.rows))
    return 0


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _parser.add_argument("--json", type=Path, required=True, help="results, row by row; continued where it exists")
    _parser.add_argument(
        "--ways", default="none,localisation", help="losses, each with =WEIGHT or not; the first is the base"
    )
    _parser.add_argument("--seeds", type=int, default=3, help="how many (default %(default)s)")
    _parser.add_argument("--first-seed", type=int, default=0)
    _parser.add_argument("--images", type=int, default=32, help="pictures for each seed (default %(default)s)")
    _parser.add_argument("--sampling-steps", type=int, default=16)
    _parser.add_argument("--steps", type=int, default=Recipe.steps, help="of training (default %(default)s)")
    _parser.add_argument("--batch", type=int, default=Recipe.batch)
    _parser.add_argument("--scenes", type=int, default=Recipe.scenes)
    _parser.add_argument("--alike", action="store_true", help="one shape for the two of a training scene")
    _parser.add_argument("--subjects", type=int, default=Recipe.subjects)
    try:
        raise SystemExit(main(_parser.parse_args()))
    except ControlError as error:
        _parser.exit(2, f"compare: {error}\n")
