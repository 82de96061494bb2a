"""The command line: attnctrl layout | methods | bench | train-shapes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

from attnctrl.errors import ControlError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; bad input ends with its sentence on stderr and exit status 2."""
    # Imported here, one by one, so that --help does not wait for torch.
    from attnctrl import bench
    from attnctrl.commands import layout, methods
    from attnctrl.shapes import train

    parser = argparse.ArgumentParser(prog="attnctrl", description="Attention control for diffusers pipelines.")
    parser.add_argument("--version", action="version", version=version("attnctrl"))
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module, text in (
        ("layout", layout, "draw a prompt with objects in their regions"),
        ("methods", methods, "list the methods with their parameters"),
        ("bench", bench, "measure methods, side by side, on the shapes world"),
        ("train-shapes", train, "train a shipped model anew"),
    ):
        command = commands.add_parser(name, help=text, description=text)
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
