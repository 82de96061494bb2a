"""attnctrl ui: the web page."""

from __future__ import annotations

import argparse
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

from attnctrl.errors import ControlError
from attnctrl.models import load_pipeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="shapes-sd", help="shapes-sd, shapes-dit[+entities], shapes-video, a folder or a hub id"
    )
    parser.add_argument("--device")
    parser.add_argument("--host", default="127.0.0.1", help="who may connect; 0.0.0.0 is everybody in the network")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument("--at-once", type=int, default=1, help="runs that work at a time; others wait in line")
    parser.add_argument(
        "--file",
        type=Path,
        action="append",
        default=[],
        help="a plan that forms may name (planned, paro); repeat for more",
    )


@contextmanager
def stubs_left_alone() -> Iterator[None]:
    """Import Gradio in half the time: each import parses all its components, to rewrite the type stubs beside them.

    It leaves out classes that have no file.
    """
    find = inspect.getfile

    def find_others(thing: Any) -> str:
        if str(getattr(thing, "__module__", "")).startswith("gradio."):
            raise OSError(f"{thing} keeps the stub it has")
        return find(thing)

    with patch.object(inspect, "getfile", find_others):
        yield


def main(args: argparse.Namespace) -> int:
    """Serve the page until interrupted. Raises ControlError for bad input and where Gradio is not installed."""
    if find_spec("gradio") is None:
        raise ControlError("the web page needs Gradio: pip install 'attnctrl[ui]'.")
    if args.at_once < 1:
        raise ControlError(f"--at-once is {args.at_once}: give 1 or more.")
    for path in args.file:
        if not path.is_file():
            raise FileNotFoundError(f"--file {path}: there is no such file.")
    # Gradio reports its use unless told not to, before it is imported.
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    with stubs_left_alone():
        from attnctrl.ui.app import build_app, launch
        from attnctrl.ui.backend import Backend

    backend = Backend(args.model, {path.name: path.resolve() for path in args.file})
    page = build_app(backend, args.at_once)
    # The page is served while the model loads; what needs the model waits for it.
    launch(page, args.host, args.port, prevent_thread_lock=True)
    try:
        backend.open(lambda: load_pipeline(args.model, device=args.device))
        page.block_thread()
    finally:
        page.close()
    return 0
