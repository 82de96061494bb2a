"""attnctrl explain: one prompt drawn, and a page about what the run did."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from attnctrl.commands.layout import Drawing, add_drawing
from attnctrl.controls import method
from attnctrl.errors import ControlError
from attnctrl.explain import page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_drawing(parser, regions=False)
    # With no regions there is nothing that a layout method could act on.
    parser.set_defaults(method=None)
    parser.add_argument(
        "--phrase",
        action="append",
        default=[],
        help="words of the prompt whose attention is shown; repeat for more; default: every word",
    )
    parser.add_argument("--out", type=Path, required=True, help="the HTML page, which needs no other file")
    parser.add_argument("--force", action="store_true", help="overwrite an existing file")


def main(args: argparse.Namespace) -> int:
    """Draw, and write the page. Raises ControlError for bad input."""
    if args.out.exists() and not args.force:
        raise FileExistsError(f"{args.out} exists: choose another --out or pass --force.")
    args.method = args.method or ("loco" if args.region else "none")
    for name in args.method.split("+"):
        if not args.region and name != "none" and "regions" in method(name).settings:
            raise ControlError(f'method "{name}" acts on regions: give a --region, or --method none.')
    drawing = Drawing.of(args)
    result = drawing.draw(drawing.controls, args.phrase or words(args.prompt))
    facts = {name: getattr(args, name) for name in ("model", "method", "seed", "steps")}
    facts |= {k: v for k, v in drawing.arguments.items() if k.endswith("guidance_scale") or k == "true_cfg_scale"}
    text = page(result.run, result.images[0], args.prompt, drawing.regions, facts)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text, encoding="utf-8")
    print(f"wrote {args.out}\n{result.run.report}")
    return 0


def words(prompt: str) -> list[str]:
    """The words of a prompt, each once, in order."""
    return list(dict.fromkeys(re.findall(r"\w+(?:[-']\w+)*", prompt.lower())))
