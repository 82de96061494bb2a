"""attnctrl subjects: a prompt, pictures of what some of its words mean, pictures that show just these."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from PIL import Image

from attnctrl.commands.settings import guidance_of, parse_settings
from attnctrl.controls import REGISTRY
from attnctrl.errors import ControlError
from attnctrl.pictures import sheet
from attnctrl.pipelines.subjects import NOISES, SubjectsPipeline
from attnctrl.references import Subject
from attnctrl.words import WAYS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", required=True, action="append", help="repeat for a set of pictures")
    parser.add_argument(
        "--subject",
        action="append",
        required=True,
        metavar="PHRASE=FILE[@X0,Y0,X1,Y1]",
        help="words of the prompt, a picture of what they mean, and where it belongs; repeat for more, also for "
        "further pictures of the same words; transparency is its mask",
    )
    parser.add_argument(
        "--mask",
        action="append",
        default=[],
        metavar="FILE",
        help="where the picture shows the subject, bright inside; one for each --subject, in their order",
    )
    names = ", ".join(m.name for m in REGISTRY.values() if m.task == "subjects")
    parser.add_argument("--method", default="magic-face", help=f"none, or of {names}; several with +, and of layout")
    parser.add_argument("--words", default="learned", help=f"of methods that want words: {', '.join(WAYS)}")
    parser.add_argument(
        "--among", metavar="WORD,WORD", help="found words are chosen among these; default: all that the tokenizer knows"
    )
    parser.add_argument("--noise", default="one", help=f"of the references: {', '.join(NOISES)}")
    parser.add_argument("--set", action="append", default=[], metavar="PARAM=VALUE", help="a parameter of the method")
    parser.add_argument("--model", default="shapes-sd", help="shapes-sd, shapes-dit, a folder or a hub id")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, metavar="S", help="default: shapes models 3.5, others their own")
    parser.add_argument(
        "--call", nargs="+", default=[], metavar="NAME=VALUE", help="further arguments of the pipeline's call"
    )
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, required=True, help="the picture, of a set side by side")
    parser.add_argument("--force", action="store_true", help="overwrite an existing file")


def main(args: argparse.Namespace) -> int:
    """Draw, save, report. Raises ControlError for bad input."""
    if args.out.exists() and not args.force:
        raise FileExistsError(f"{args.out} exists: choose another --out or pass --force.")
    subjects = parse_subjects(args.subject, args.mask)
    options: dict[str, Any] = parse_settings(args.set, "--set") | parse_settings(args.call, "--call")
    pipeline = SubjectsPipeline.from_pretrained(args.model, device=args.device)
    result = pipeline(
        args.prompt,
        subjects,
        method=args.method.split("+"),
        words=args.words,
        among=[word.strip() for word in args.among.split(",")] if args.among else None,
        reference_noise=args.noise,
        num_inference_steps=args.steps,
        guidance=guidance_of(args),
        seed=args.seed,
        **options,
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    drawn = result.images
    whole = drawn[0] if len(drawn) == 1 else sheet(list(zip(args.prompt, drawn, strict=True)), columns=len(drawn))
    whole.save(args.out)
    print(f"wrote {args.out}\n{result.report}")
    return 0


def parse_subjects(texts: list[str], masks: list[str]) -> list[Subject]:
    """Subjects from "phrase=file" or "phrase=file@x0,y0,x1,y1"; texts with the same phrase are one subject's pictures.

    Raises ControlError for other texts, and where there are masks for some of them only.
    """
    if masks and len(masks) != len(texts):
        raise ControlError(f"{len(masks)} --mask for {len(texts)} --subject: give one for each, in their order.")
    files: dict[str, list[int]] = {}
    places: dict[str, tuple[float, ...]] = {}
    pictures = []
    for number, text in enumerate(texts):
        phrase, equals, rest = (part.strip() for part in text.partition("="))
        if not equals or not phrase or not rest:
            raise ControlError(f'--subject "{text}": write phrase=file or phrase=file@x0,y0,x1,y1.')
        path, at, box = rest.rpartition("@")
        if at and not Path(rest).exists():
            try:
                places[phrase] = tuple(float(v) for v in box.split(","))
            except ValueError:
                raise ControlError(f'--subject "{text}": a place is four numbers x0,y0,x1,y1 in 0..1.') from None
            rest = path
        files.setdefault(phrase, []).append(number)
        pictures.append(Image.open(rest))
    opened = [Image.open(mask) for mask in masks]
    return [
        Subject(
            phrase,
            [pictures[n] for n in numbers],
            [opened[n] for n in numbers] if opened else None,
            places.get(phrase),
        )
        for phrase, numbers in files.items()
    ]
