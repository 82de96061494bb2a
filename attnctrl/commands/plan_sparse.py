"""attnctrl plan-sparse: a short run, and for every layer, part of the run and head the cheapest pattern."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from attnctrl.commands.settings import parse_settings
from attnctrl.controls.sparse.plan import FULL
from attnctrl.kernels.blocks_axis import BLOCK_SIZES
from attnctrl.models import SHIPPED, call_arguments, load_pipeline
from attnctrl.pipelines.plan_sparse import plan_sparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="shapes-video", help="shapes-video, a folder or a hub id")
    parser.add_argument("--prompt", action="append", required=True, help="what the short run draws; repeat for more")
    parser.add_argument(
        "--budget", type=float, default=0.02, help="largest squared error of a head's output, relative (default 0.02)"
    )
    parser.add_argument("--steps", type=int, default=8, help="of the short run")
    parser.add_argument("--phases", type=int, default=4, help="parts of the run that are planned apart")
    parser.add_argument("--block", type=int, default=128, choices=BLOCK_SIZES, help="tokens per block")
    parser.add_argument(
        "--call", nargs="+", default=[], metavar="NAME=VALUE", help="the call's size: height=720 width=1280 ..."
    )
    parser.add_argument("--guidance", type=float, metavar="S")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, required=True, help="the plan, for Planned(plan=FILE)")
    parser.add_argument("--force", action="store_true", help="overwrite an existing file")


def main(args: argparse.Namespace) -> int:
    """Plan, save, and say what is expected of it. Raises ControlError for bad input."""
    if args.out.exists() and not args.force:
        raise FileExistsError(f"{args.out} exists: choose another --out or pass --force.")
    pipe = load_pipeline(args.model, device=args.device)
    size: dict[str, Any] = parse_settings(args.call, "--call")
    if args.model == f"{SHIPPED}video":
        from attnctrl.shapes import VIDEO_CALL

        size = {**VIDEO_CALL, **size}

    def draw() -> None:
        for prompt in args.prompt:
            seed = torch.Generator().manual_seed(args.seed)
            given = {"num_inference_steps": args.steps, "generator": seed, "output_type": "latent", **size}
            pipe(**call_arguments(pipe, prompt, args.guidance, given))

    plan = plan_sparse(pipe, draw, args.budget, args.phases, args.block)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    plan.save(args.out)
    found = plan.predicted
    print(f"wrote {args.out}")
    print(
        f"expected: {100 * found['density']:.0f}% of the pairs, {100 * found['cost']:.0f}% of the attention's time, "
        f"mean squared error {found['error']:.4f}"
    )
    for number, pattern in enumerate(plan.patterns):
        share = sum(c.pattern == number for c in plan.choices) / len(plan.choices)
        inside = ";".join(f"{name}={value}" for name, value in pattern.params)
        label = pattern.name if pattern.name == FULL else f"{pattern.name}{{{inside}}}"
        if share:
            print(f"{100 * share:5.1f}%  {label}")
    return 0
