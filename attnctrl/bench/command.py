"""The command `attnctrl bench`: its arguments, and what it runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from attnctrl.bench import (
    dose,
    edit,
    fidelity,
    guidance,
    inversion,
    kernels,
    layout,
    overhead,
    readout,
    sparse,
    sparse_ways,
    subjects,
)
from attnctrl.bench.compare import compare
from attnctrl.bench.draw import DTYPES, Settings
from attnctrl.bench.edit_ways import parse_instruct_ways, parse_ways
from attnctrl.bench.methods import Spec, parse_methods
from attnctrl.bench.results import Results, environment, fingerprint
from attnctrl.bench.tables import results_table
from attnctrl.commands.settings import parse_settings
from attnctrl.errors import ControlError
from attnctrl.kernels.blocks_axis import BLOCK_SIZES
from attnctrl.models import load_pipeline

COMPARISONS: dict[str, ModuleType] = {"layout": layout, "fidelity": fidelity, "dose": dose}
GUIDANCE = 3.5
BENCHES = (*COMPARISONS, "edit", "inversion", "subjects", "guidance", "readout", "sparse", "overhead", "kernels")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `attnctrl bench`."""
    parser.add_argument("bench", choices=BENCHES, help="what to measure")
    parser.add_argument("--quick", action="store_true", help="few pictures: minutes on two cores, wide intervals")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the results here, row by row")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the --json file already holds")
    parser.add_argument(
        "--model",
        help="shapes-sd, shapes-dit, shapes-dit+entities (with its LoRA, for eligen{entity_tokens=8}), or a pipeline's "
        "folder or name (default: shapes-sd; sparse: shapes-video)",
    )
    parser.add_argument("--images", type=_count, metavar="N", help="pictures per row; overhead, kernels: repetitions")
    parser.add_argument("--kinds", metavar="A,B", help=f"edit: which of {', '.join(edit.KINDS)} (default: all)")
    parser.add_argument("--objects", type=_counts, metavar="2,3,4", help="numbers of objects, each 1 to 4")
    parser.add_argument(
        "--methods",
        metavar="A,B{PARAM=VALUE},C+D",
        help='comma-separated; "none" is the stock pipeline, "ideal" the best score there is; parameters as in '
        '"loco{scale=30|60;iterations=3}"; for edit with @INVERSION (not on shapes-instruct) and, where the mask is '
        "given, :mask; for subjects with :boxes where their regions are given",
    )
    parser.add_argument("--split", choices=("tune", "test"), help="which prompts (dose: tune; else: test)")
    parser.add_argument(
        "--steps", type=_count, metavar="N", help="sampling steps (default 25; overhead 10, inversion 50)"
    )
    parser.add_argument("--guidance", type=float, metavar="S", help="guidance scale (default 3.5; inversion 1)")
    parser.add_argument(
        "--call", nargs="+", default=[], metavar="NAME=VALUE", help="further arguments of the pipeline's call"
    )
    parser.add_argument("--batch", type=_count, default=8, metavar="N", help="prompts per call (default 8)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other tasks (default 0)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="bf16: run under autocast")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--param", default=dose.PARAM, help="dose: the parameter (default %(default)s)")
    parser.add_argument("--densities", metavar="1,0.3", help="sparse: shares of the pairs (default 1,0.5,0.3,0.2,0.1)")
    parser.add_argument(
        "--block", type=int, default=sparse_ways.BLOCK, choices=BLOCK_SIZES, help="sparse: tokens (default %(default)s)"
    )
    parser.add_argument("--values", default=dose.VALUES, help="dose: its values (default %(default)s)")


def main(args: argparse.Namespace) -> int:
    """Run `args.bench` and print its table. Returns 0; 1 when a method failed; 2 when the request makes no sense."""
    args.model = args.model or ("shapes-video" if args.bench == "sparse" else "shapes-sd")
    try:
        others = {"kernels": _kernels, "overhead": _overhead, "edit": _edit, "sparse": _sparse}
        others |= {"guidance": _guidance, "readout": _readout, "subjects": _subjects, "inversion": _inversion}
        run = others.get(args.bench)
        results = _comparison(args, COMPARISONS[args.bench]) if run is None else run(args)
    except ControlError as error:
        print(f"attnctrl bench: {error}", file=sys.stderr)
        return 2
    return 1 if results.failed else 0


def _comparison(args: argparse.Namespace, bench: ModuleType) -> Results:
    images = args.images or (bench.QUICK_IMAGES if args.quick else bench.IMAGES)
    settings = _settings(args, steps=25, batch=min(args.batch, images))
    pipe = _load(args)
    specs = _specs(args, bench, pipe)
    results = _results(args, settings, images=images, weights=fingerprint(pipe))
    if args.resume:
        results.resume()
    compare(pipe, specs, args.objects or bench.OBJECTS, images, settings, results, bench.BOXES)
    print(results_table(results, bench.TABLE))
    return results


def _edit(args: argparse.Namespace) -> Results:
    images = args.images or (edit.QUICK_IMAGES if args.quick else edit.IMAGES)
    settings = _settings(args, steps=25, batch=1)
    pipe = _load(args)
    parse = parse_instruct_ways if edit.instructed(pipe) else parse_ways
    ways = parse(args.methods) if args.methods else edit.default_ways(pipe)
    kinds = edit.parse_kinds(args.kinds) if args.kinds else edit.KINDS
    some = {"kinds": ",".join(kinds)} if args.kinds else {}
    results = _results(args, settings, images=images, weights=fingerprint(pipe), **some)
    if args.resume:
        results.resume()
    edit.measure(pipe, ways, images, settings, results, kinds)
    print(results_table(results, edit.TABLE))
    return results


def _guidance(args: argparse.Namespace) -> Results:
    return _measured(args, guidance, parse_methods(args.methods or guidance.default_methods()))


def _readout(args: argparse.Namespace) -> Results:
    return _measured(args, readout, parse_methods(args.methods or readout.METHODS))


def _subjects(args: argparse.Namespace) -> Results:
    return _measured(args, subjects, subjects.parse_ways(args.methods or subjects.METHODS), batch=1)


def _inversion(args: argparse.Namespace) -> Results:
    args.steps = args.steps or inversion.STEPS
    args.guidance = inversion.GUIDANCE if args.guidance is None else args.guidance
    names = args.methods or inversion.default_methods(_load(args))
    return _measured(args, inversion, inversion.parse_inversions(names), batch=1)


def _measured(args: argparse.Namespace, bench: ModuleType, rows: list[Any], batch: int | None = None) -> Results:
    """A bench whose `measure` adds the rows of several numbers of objects."""
    images = args.images or (bench.QUICK_IMAGES if args.quick else bench.IMAGES)
    settings = _settings(args, steps=25, batch=batch or min(args.batch, images))
    pipe = _load(args)
    results = _results(args, settings, images=images, weights=fingerprint(pipe))
    if args.resume:
        results.resume()
    bench.measure(pipe, rows, args.objects or bench.OBJECTS, images, settings, results)
    print(results_table(results, bench.TABLE))
    return results


def _sparse(args: argparse.Namespace) -> Results:
    clips = args.images or (sparse.QUICK_IMAGES if args.quick else sparse.IMAGES)
    densities = sparse.parse_densities(args.densities) if args.densities else sparse.DENSITIES
    names = (args.methods or sparse.DEFAULT_METHODS).split(",")
    settings = _settings(args, steps=24, batch=1)
    pipe = _load(args)
    results = _results(args, settings, images=clips, block=args.block, weights=fingerprint(pipe))
    if args.resume:
        results.resume()
    sparse.measure(pipe, names, densities, clips, settings.steps, settings.guidance, args.block, results)
    print(results_table(results, sparse.TABLE))
    return results


def _overhead(args: argparse.Namespace) -> Results:
    if args.resume:
        raise ControlError("overhead takes its repetitions in turns, so it cannot be resumed.")
    repetitions = args.images or (overhead.QUICK_REPETITIONS if args.quick else overhead.REPETITIONS)
    settings = _settings(args, steps=10, batch=max(overhead.BATCHES))
    pipe = _load(args)
    specs = _specs(args, overhead, pipe)
    with overhead.one_thread(pipe.device):
        results = _results(args, settings, repetitions=repetitions, weights=fingerprint(pipe))
        overhead.measure(pipe, specs, repetitions, settings, results)
    print(overhead.table(results))
    return results


def _kernels(args: argparse.Namespace) -> Results:
    if args.resume:
        raise ControlError("kernels is measured in one go, so it cannot be resumed.")
    device = _device(args)
    repetitions = args.images or (kernels.QUICK_REPETITIONS if args.quick else kernels.REPETITIONS)
    settings = {"repetitions": repetitions, "seed": args.seed, "device": device.type}
    where = environment(device, str(kernels.dtype_of(device)).removeprefix("torch."))
    results = Results(args.bench, "-", settings, where, path=args.json)
    kernels.measure(device, repetitions, args.seed, results)
    print(kernels.table(results))
    return results


def _settings(args: argparse.Namespace, steps: int, batch: int) -> Settings:
    return Settings(
        steps=args.steps or steps,
        guidance=GUIDANCE if args.guidance is None else args.guidance,
        batch=batch,
        dtype=args.dtype,
        seed=args.seed,
        split=args.split or ("tune" if args.bench == "dose" else "test"),
        call=parse_settings(args.call, "--call"),
    )


def _results(args: argparse.Namespace, settings: Settings, **more: int | str) -> Results:
    where = environment(_device(args), args.dtype)
    return Results(args.bench, args.model, {**settings.as_dict(), **more}, where, path=args.json)


def _specs(args: argparse.Namespace, bench: ModuleType, pipe: Any) -> list[Spec]:
    """The methods that were asked for; by default, of the bench's own, those that the pipeline has layers for."""
    if bench is dose:
        return parse_methods(dose.default_methods(args.methods or dose.METHOD, args.param, args.values))
    if args.methods:
        return parse_methods(args.methods)
    return [spec for spec in parse_methods(bench.default_methods()) if spec.fits(pipe)]


def _load(args: argparse.Namespace) -> Any:
    """The pipeline to measure, in float32 and without a progress bar of its own."""
    pipe = load_pipeline(args.model, device=_device(args), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _device(args: argparse.Namespace) -> torch.device:
    return torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: give 1 or more")
    return value


def _counts(text: str) -> tuple[int, ...]:
    values = tuple(dict.fromkeys(int(t) for t in text.split(",")))
    if not values or not all(1 <= v <= 4 for v in values):
        raise argparse.ArgumentTypeError(f'"{text}": give numbers from 1 to 4, such as 2,3')
    return values
