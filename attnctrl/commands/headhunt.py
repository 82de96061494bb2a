"""attnctrl headhunt: a search of the attention heads whose perturbation guides best."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from attnctrl.commands.settings import guidance_of, parse_settings
from attnctrl.errors import ControlError
from attnctrl.headhunt import OBJECTIVES, Query, candidates, hunt, objective_of, scorer
from attnctrl.headset import Head, HeadSet
from attnctrl.models import load_pipeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(OBJECTIVES)
    parser.add_argument(
        "--objective",
        default="well-formed",
        help=f"{names} (shapes world), module:function or file.py:function, called with (picture, prompt)",
    )
    parser.add_argument("--prompt", action="append", default=[], help="repeat for more; default: shapes world scenes")
    parser.add_argument("--images", type=int, default=8, help="pictures per set of heads")
    parser.add_argument("--objects", type=int, default=3, help="objects in a scene of the shapes world, 1 to 4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=int, default=2, help="heads that each round adds")
    parser.add_argument(
        "--layer", action="append", default=[], metavar="NAME", help="search here alone; repeat for more"
    )
    parser.add_argument("--set", action="append", default=[], metavar="PARAM=VALUE", help="a parameter of soft-pag")
    parser.add_argument("--model", default="shapes-sd", help="shapes-sd, shapes-dit, a folder or a hub id")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8, help="pictures per call of the pipeline")
    parser.add_argument("--guidance", type=float, metavar="S", help="default: shapes models 3.5, others their own")
    parser.add_argument(
        "--call", nargs="+", default=[], metavar="NAME=VALUE", help="further arguments of the pipeline's call"
    )
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, required=True, help="JSON; an unfinished search of the same kind goes on")
    parser.add_argument("--force", action="store_true", help="begin anew and overwrite")


def main(args: argparse.Namespace) -> int:
    """Search, save after each round, print the ranking. Raises ControlError for bad input."""
    for name in ("images", "rounds", "keep", "steps", "batch"):
        if getattr(args, name) < 1:
            raise ControlError(f"--{name} is {getattr(args, name)}: give 1 or more.")
    if not args.prompt and not 1 <= args.objects <= 4:
        raise ControlError(f"--objects is {args.objects}: give 1 to 4.")
    kept = ("model", "objective", "prompt", "images", "objects", "keep", "layer", "set", "seed", "steps", "guidance")
    about = {name: getattr(args, name) for name in (*kept, "call")}
    found = HeadSet(about=about)
    if args.out.exists() and not args.force:
        found = HeadSet.load(args.out)
        if found.about != about:
            raise FileExistsError(f"{args.out} is of another search: choose another --out or pass --force.")
    objective, params = objective_of(args.objective), parse_settings(args.set, "--set")
    pipe = load_pipeline(args.model, device=args.device)
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"guidance": guidance_of(args), "num_inference_steps": args.steps}
    call |= parse_settings(args.call, "--call")
    score = scorer(pipe, queries(args), objective, params, call, args.batch)
    heads, start = candidates(pipe, args.layer), time.monotonic()
    print(f"{len(heads)} heads; the pictures without perturbation score {score(()):.3f}", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)

    def after_round(now: HeadSet) -> None:
        now.save(args.out)
        best = ", ".join(f"{_label(head)} {value:.3f}" for head, value in now.rounds[-1][: args.keep])
        print(f"round {len(now.rounds)}: {best} ({time.monotonic() - start:.0f} s)", flush=True)

    found = hunt(score, heads, args.rounds, args.keep, found, after_round)
    print(f"heads: {', '.join(map(_label, found.heads))}\nwrote {args.out}")
    return 0


def queries(args: argparse.Namespace) -> list[Query]:
    """The pictures to draw: the prompts in turn, or scenes of the shapes world."""
    if args.prompt:
        return [Query(args.prompt[i % len(args.prompt)], args.seed + i) for i in range(args.images)]
    from attnctrl.bench.tasks import make_tasks

    tasks = make_tasks(args.objects, args.images, "tune", args.seed)
    return [Query(task.prompt, task.seed, tuple(task.layout.asked)) for task in tasks]


def _label(head: Head) -> str:
    return f"{head[0]}:{head[1]}"
