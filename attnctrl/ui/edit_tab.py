"""The Edit tab: a given picture, its prompt and what is to change; regions confine the changes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import gradio as gr

from attnctrl.errors import ControlError
from attnctrl.inversion import INVERSIONS
from attnctrl.ui.canvas import backdrop, draw_canvas
from attnctrl.ui.chooser import draw_chooser
from attnctrl.ui.desk import Desk
from attnctrl.ui.examples import edit_example, has_examples
from attnctrl.ui.files import open_picture
from attnctrl.ui.panel import connect_check, connect_stop, draw_buttons, draw_numbers, draw_panel, follow, plain, usable
from attnctrl.ui.request import Request, read_places
from attnctrl.ui.result import Pictures


def draw_edit(desk: Desk, page: gr.Blocks) -> None:
    backend = desk.backend
    with gr.Row():
        with gr.Column(scale=4):
            given = gr.File(
                label="The picture (PNG, JPEG or WebP)", file_types=[".png", ".jpg", ".jpeg", ".webp"], height=110,
                elem_id="edit-file",
            )  # fmt: skip
            fill = gr.Button("Example", size="sm", visible=has_examples(backend.model), elem_id="edit-example")
            prompt = gr.Textbox(label="What the picture shows", lines=2, max_length=2000, elem_id="edit-prompt")
            edits = gr.Textbox(
                label="Changes, one a line", placeholder="red circle = green star", lines=2, max_length=4000,
                info="words of the prompt = other words", elem_id="edit-edits",
            )  # fmt: skip
            moves = gr.Textbox(
                label="Objects that move (design-edit), one a line", placeholder="red circle = 0.3, 0", max_length=4000,
                info="words of a region = right, down [, size], or remove", elem_id="edit-moves",
            )  # fmt: skip
            target = gr.Textbox(label="Or the whole other prompt", max_length=2000, elem_id="edit-target")
            canvas = draw_canvas("edit-canvas", "drag to confine a change")
            problem = gr.Markdown("", elem_id="edit-problem", elem_classes="problem")
            chooser = draw_chooser(backend, "edit", ["prompt-to-prompt"])
            with gr.Row():
                inversion = gr.Dropdown([*INVERSIONS], value="direct", label="Inversion", min_width=120)
                feather = gr.Number(4, label="Soft edge, pixels", precision=0, minimum=0, maximum=256, min_width=110)
            seed, steps, guidance = draw_numbers("edit", backend, 0, 50)
        with gr.Column(scale=5):
            run, stop = draw_buttons("edit")
            panel = draw_panel("edit", run, stop, "Redrawn unchanged", "Edited", None)

    def read(values: tuple) -> tuple[Request, Pictures]:
        file, prompt, edits, moves, target, canvas, inversion, feather, seed, steps, guidance, *rest = values
        request = Request.read(
            {
                "task": "edit",
                "prompt": prompt,
                "edits": read_edits(edits),
                "moves": read_moves(moves),
                "target": target,
                "regions": [{k: v for k, v in vars(p).items() if v is not None} for p in read_places(canvas)],
                "methods": chooser.methods(rest),
                "inversion": inversion,
                "feather": feather,
                "seed": seed,
                "steps": steps,
                "guidance": guidance,
            }
        )
        return request, [open_picture(file)]

    def go(request: gr.Request, *values: Any) -> Iterator[dict]:
        yield from follow(desk, panel, str(request.session_hash), lambda: read(values))

    def show(file: str | None) -> tuple[Any, str]:
        """The given picture behind the canvas."""
        if file is None:
            return gr.HTML(**backdrop(None)), ""
        try:
            return gr.HTML(**backdrop(open_picture(file))), ""
        except ControlError as error:
            return gr.HTML(**backdrop(None)), plain(str(error))

    inputs = [given, prompt, edits, moves, target, canvas, inversion, feather, seed, steps, guidance, *chooser.inputs]
    run.click(go, inputs, panel.outputs, show_progress="hidden", concurrency_limit=None, api_visibility="private")
    connect_stop(desk, stop)

    def begin() -> list[Any]:
        """The example's picture, prompt, changes and region."""
        picture, wanted = edit_example()
        path = desk.outbox.put(picture, backend.model, wanted.data())
        lines = [" = ".join(pair) for pair in wanted.edits]
        return [path, wanted.prompt, "\n".join(lines), "", "", json.dumps(wanted.data()["regions"])]

    def arrive(chosen: list[str]) -> list[Any]:
        drawer, ready = usable(desk, "edit")
        return [gr.skip() if drawer is None else chooser.offered(chosen, drawer.kinds), ready]

    page.load(arrive, chooser.chosen, [chooser.chosen, panel.status], show_progress="hidden", api_visibility="private")
    fill.click(
        begin, None, [given, prompt, edits, moves, target, canvas], show_progress="hidden", api_visibility="private"
    )
    given.change(show, given, [canvas, problem], show_progress="hidden", api_visibility="private")
    connect_check(desk, "edit", prompt, canvas, problem)


def read_edits(text: str) -> list[list[str]]:
    """ "words = other words" a line. Raises ControlError for lines without "="."""
    found = []
    for line in filter(str.strip, text.splitlines()):
        words, equals, other = (part.strip() for part in line.partition("="))
        if not equals or not words:
            raise ControlError(f'the change "{line[:60]}": write words of the prompt = other words.')
        found.append([words, other])
    return found


def read_moves(text: str) -> list[dict[str, Any]]:
    """ "words = right, down [, size]" or "words = remove" a line. Raises ControlError for other lines."""
    found: list[dict[str, Any]] = []
    for line in filter(str.strip, text.splitlines()):
        words, _, rest = (part.strip() for part in line.partition("="))
        if words and rest == "remove":
            found.append({"phrase": words, "remove": True})
            continue
        try:
            numbers = [float(one) for one in rest.split(",")]
        except ValueError:
            numbers = []
        if not words or len(numbers) not in (2, 3):
            raise ControlError(f'the move "{line[:60]}": write words = right, down [, size], or words = remove.')
        found.append({"phrase": words, **dict(zip(("dx", "dy", "resize"), numbers, strict=False))})
    return found
