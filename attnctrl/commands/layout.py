"""attnctrl layout: one prompt, its regions, one picture, and the comparison with the stock picture."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from attnctrl.commands.settings import guidance_of, parse_settings
from attnctrl.control import Control
from attnctrl.errors import ControlError
from attnctrl.models import call_arguments
from attnctrl.pictures import sheet, with_regions
from attnctrl.pipelines import LayoutPipeline
from attnctrl.pipelines.layout import LayoutResult
from attnctrl.pipelines.methods import make_controls
from attnctrl.regions import Region


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_drawing(parser, regions=True)
    parser.add_argument("--out", type=Path, required=True, help="the picture; FILE-compare.png goes beside it")
    parser.add_argument("--force", action="store_true", help="overwrite existing files")


def add_drawing(parser: argparse.ArgumentParser, regions: bool) -> None:
    """The arguments that say what to draw and how; regions: whether there must be any."""
    parser.add_argument("--prompt", required=True)
    parser.add_argument(
        "--region",
        action="append",
        required=regions,
        default=None if regions else [],
        metavar="PHRASE@X0,Y0,X1,Y1",
        help="fractions of the picture, origin top left; repeat for more; a phrase alone takes the next --mask",
    )
    parser.add_argument("--mask", action="append", default=[], metavar="FILE", help="bright pixels are inside")
    parser.add_argument("--method", default="loco", help='a name of "attnctrl methods", several with +')
    parser.add_argument("--set", action="append", default=[], metavar="PARAM=VALUE", help="a parameter of the method")
    parser.add_argument("--model", default="shapes-sd", help="shapes-sd, shapes-dit[+entities], a folder or a hub id")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument(
        "--guidance",
        type=float,
        metavar="S",
        help="guidance scale (default: shapes models 3.5, others their own)",
    )
    parser.add_argument(
        "--call", nargs="+", default=[], metavar="NAME=VALUE", help="further arguments of the pipeline's call"
    )
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--device")


@dataclass(frozen=True)
class Drawing:
    """A pipeline with what it is to be called with. Every `draw` starts from the same seed."""

    layout: LayoutPipeline
    regions: list[Region]
    controls: list[Control]
    arguments: dict[str, Any]
    seed: int

    @classmethod
    def of(cls, args: argparse.Namespace) -> Drawing:
        """What the arguments of `add_drawing` ask for. Raises ControlError for bad input."""
        regions = parse_regions(args.region, args.mask)
        # Before the model is loaded, which may take long.
        chosen = args.method.split("+")
        controls = make_controls(chosen, "layout", {"regions": regions}, parse_settings(args.set, "--set"))
        call = parse_settings(args.call, "--call")
        layout = LayoutPipeline.from_pretrained(args.model, device=args.device)
        options: dict[str, Any] = {"num_inference_steps": args.steps}
        options |= {k: v for k, v in (("height", args.height), ("width", args.width)) if v}
        arguments = call_arguments(layout.pipe, args.prompt, guidance_of(args), options | call)
        return cls(layout, regions, controls, arguments, args.seed)

    def draw(self, controls: Sequence[Control], record: bool | Sequence[str] = True) -> LayoutResult:
        # Noise drawn on the CPU is the same on every device.
        arguments = {"generator": torch.Generator().manual_seed(self.seed), **self.arguments}
        return self.layout(regions=self.regions, method=controls, record=record, **arguments)


def main(args: argparse.Namespace) -> int:
    """Draw, save, compare with the stock picture of the same seed, report. Raises ControlError for bad input."""
    compare = args.out.with_name(f"{args.out.stem}-compare.png")
    if not args.force:
        for path in (args.out, compare):
            if path.exists():
                raise FileExistsError(f"{path} exists: choose another --out or pass --force.")
    drawing = Drawing.of(args)
    result = drawing.draw(drawing.controls)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    result.images[0].save(args.out)
    print(f"wrote {args.out}")
    stock = drawing.draw(())
    pictures = [("stock", stock.images[0]), (args.method, result.images[0])]
    sheet([(name, with_regions(p, drawing.regions)) for name, p in pictures], columns=2).save(compare)
    print(f"wrote {compare}\n{result.run.report}")
    return 0


def parse_regions(texts: list[str], masks: list[str]) -> list[Region]:
    """Regions from "phrase@x0,y0,x1,y1" and, for phrases alone, from mask files in order."""
    left, regions = list(masks), []
    for text in texts:
        phrase, at, place = text.rpartition("@")
        if at:
            try:
                x0, y0, x1, y1 = (float(v) for v in place.split(","))
            except ValueError:
                raise ControlError(f'--region "{text}": write phrase@x0,y0,x1,y1 with four numbers in 0..1.') from None
            regions.append(Region(phrase, box=(x0, y0, x1, y1)))
        elif left:
            regions.append(Region(text, mask=Image.open(left.pop(0))))
        else:
            raise ControlError(f'--region "{text}" has no place: write phrase@x0,y0,x1,y1 or give a --mask FILE.')
    if left:
        raise ControlError(f"--mask {left[0]} belongs to no region: give a --region with its phrase alone.")
    return regions
