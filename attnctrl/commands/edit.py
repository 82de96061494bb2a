"""attnctrl edit: a picture, what it shows, what it is to show."""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from attnctrl.canvas import as_picture
from attnctrl.commands.settings import guidance_of, parse_settings
from attnctrl.controls import REGISTRY
from attnctrl.edits import Edit
from attnctrl.errors import ControlError
from attnctrl.inversion import INVERSIONS
from attnctrl.pictures import sheet
from attnctrl.pipelines import EditPipeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", type=Path, required=True, help="the picture, of any size")
    parser.add_argument("--source", required=True, metavar="PROMPT", help="what the picture shows")
    parser.add_argument("--target", metavar="PROMPT", help="what it is to show; or give --edit")
    parser.add_argument(
        "--edit",
        action="append",
        default=[],
        metavar="WORDS=OTHER",
        help="words of the source prompt and what takes their place; repeat for more",
    )
    parser.add_argument(
        "--mask",
        action="append",
        default=[],
        metavar="FILE",
        help="where the picture may change, bright inside; with several --edit one for each, in their order",
    )
    names = ", ".join(m.name for m in REGISTRY.values() if m.task == "editing")
    parser.add_argument("--method", default="prompt-to-prompt", help=f"none, or of {names}; several with +")
    parser.add_argument("--inversion", default="direct", help=f"one of {', '.join(INVERSIONS)}")
    parser.add_argument("--set", action="append", default=[], metavar="PARAM=VALUE", help="a parameter of the method")
    parser.add_argument("--model", default="shapes-sd", help="shapes-sd, shapes-dit, a folder or a hub id")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, metavar="S", help="default: shapes models 3.5, others their own")
    parser.add_argument("--feather", type=int, default=4, metavar="PIXELS", help="soft edge around the mask")
    parser.add_argument(
        "--call", nargs="+", default=[], metavar="NAME=VALUE", help="further arguments of the pipeline's call"
    )
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, required=True, help="the picture; FILE-compare.png goes beside it")
    parser.add_argument("--force", action="store_true", help="overwrite existing files")


def main(args: argparse.Namespace) -> int:
    """Edit, save, show given, redrawn and edited side by side, report. Raises ControlError for bad input."""
    compare = args.out.with_name(f"{args.out.stem}-compare.png")
    for path in () if args.force else (args.out, compare):
        if path.exists():
            raise FileExistsError(f"{path} exists: choose another --out or pass --force.")
    edits, whole = parse_edits(args.edit, args.mask)
    source = as_picture(opened(args.image))
    check_format(args.out, "RGBA" if source.has_transparency_data else "RGB")
    pipeline = EditPipeline.from_pretrained(args.model, device=args.device)
    options: dict[str, Any] = parse_settings(args.set, "--set") | parse_settings(args.call, "--call")
    result = pipeline(
        source,
        args.source,
        args.target,
        edits=edits,
        mask=whole,
        method=args.method.split("+"),
        inversion=args.inversion,
        num_inference_steps=args.steps,
        guidance=guidance_of(args),
        seed=args.seed,
        feather=args.feather,
        **options,
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    result.images[0].save(args.out)
    print(f"wrote {args.out}")
    pictures = [("given", source), ("redrawn", result.reconstruction), (result.prompt, result.images[0])]
    shown = [(name, one.convert("RGB").resize(result.images[0].size)) for name, one in pictures]
    sheet(shown, columns=3).save(compare)
    print(f"wrote {compare}\n{result.run.report}")
    return 0


def opened(path: Path | str) -> Image.Image:
    """The picture of a file, upright. Raises ControlError for files that are none."""
    try:
        return ImageOps.exif_transpose(Image.open(path))
    except FileNotFoundError:
        raise
    except (OSError, Image.DecompressionBombError) as error:
        raise ControlError(f"{path} is not a picture that can be read: {error}.") from None


def check_format(path: Path, mode: str) -> None:
    """Raises ControlError, before anything is drawn, where `path` names no format that holds pictures of a mode."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise ControlError(f'--out {path}: "{path.suffix}" is no kind of picture that can be written: use .png.')
    try:
        Image.new(mode, (1, 1)).save(io.BytesIO(), kind)
    except (OSError, ValueError):
        raise ControlError(f"--out {path}: {kind} has no transparency, and the picture has: use .png.") from None


def parse_edits(texts: list[str], masks: list[str]) -> tuple[list[Edit], Image.Image | None]:
    """Edits from "words=other words", each with its mask file where there are as many; and one mask for everything."""
    pairs = []
    for text in texts:
        source, equals, target = (part.strip() for part in text.partition("="))
        if not equals or not source:
            raise ControlError(f'--edit "{text}": write words=other words.')
        pairs.append((source, target))
    given = [opened(path) for path in masks]
    if len(given) == len(pairs):
        return [Edit(*pair, mask) for pair, mask in zip(pairs, given, strict=True)], None
    if len(given) > 1:
        raise ControlError(f"{len(given)} --mask for {len(pairs)} --edit: give one for each, or one for all.")
    return [Edit(*pair) for pair in pairs], given[0] if given else None
