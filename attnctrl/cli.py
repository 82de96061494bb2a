"""The command line `attnctrl` and its commands."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from attnctrl.errors import ControlError

COMMANDS = {
    "layout": ("attnctrl.commands.layout", "draw a prompt with objects in their regions"),
    "edit": ("attnctrl.commands.edit", "change a given picture by changing its prompt"),
    "explain": ("attnctrl.commands.explain", "draw a prompt and write a page about what the run did"),
    "subjects": ("attnctrl.commands.subjects", "draw given subjects, one or several in a picture"),
    "plan-sparse": ("attnctrl.commands.plan_sparse", "find the cheapest sparse attention within an error budget"),
    "headhunt": ("attnctrl.commands.headhunt", "search the attention heads whose perturbation guides best"),
    "methods": ("attnctrl.commands.methods", "list the methods with their parameters"),
    "bench": ("attnctrl.bench", "measure methods, side by side, on the shapes world"),
    "ui": ("attnctrl.commands.ui", "serve the web page"),
    "export-comfy": ("attnctrl.commands.export_comfy", "write the nodes for ComfyUI"),
    "train-shapes": ("attnctrl.shapes.train", "train a shipped model anew"),
    "train-subjects": ("attnctrl.training.train", "fine-tune words and a LoRA for subjects, with losses on attention"),
}
"""Each command's module, with `add_arguments` and `main`, and what it does."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; bad input ends with its sentence on stderr and exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    asked = next((text for text in argv if not text.startswith("-")), None)
    parser = argparse.ArgumentParser(prog="attnctrl", description="Attention control for diffusers pipelines.")
    parser.add_argument("--version", action="version", version=version("attnctrl"))
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (place, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        # The others' modules are not waited for: one of them brings the training of models along.
        if name == asked:
            module = import_module(place)
            module.add_arguments(command)
            command.set_defaults(run=module.main)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args) or 0)
    except (ControlError, FileExistsError, FileNotFoundError) as error:
        print(f"attnctrl {args.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
