"""attnctrl export-comfy: the ComfyUI node pack."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="of the pack, such as ComfyUI/custom_nodes/attnctrl")


def main(args: argparse.Namespace) -> int:
    """Write the pack. Raises ControlError where that would overwrite anything that is not the pack's own."""
    from attnctrl.nodes.export import export

    written = export(args.folder)
    print(f"{len(written)} files in {args.folder}")
    return 0
