"""The Edit tab: a given picture, its prompt and what is to change; regions confine the changes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import gradio as gr

from attnctrl.errors import ControlError
from attnctrl.inversion import INVERSIONS
from attnctrl.ui.canvas import backdrop, draw_canvas, scene
from attnctrl.ui.chooser import draw_chooser
from attnctrl.ui.desk import Desk
from attnctrl.ui.examples import edit_example
from attnctrl.ui.files import open_picture
from attnctrl.ui.panel import connect_stop, draw_buttons, draw_panel, follow, plain
from attnctrl.ui.request import STEPS, Request, read_places


def draw_edit(desk: Desk) -> None:
    backend = desk.backend
    with gr.Row():
        with gr.Column(scale=4):
            given = gr.File(
                label="The picture (PNG, JPEG or WebP)", file_types=[".png", ".jpg", ".jpeg", ".webp"], height=110,
                elem_id="edit-file",
            )  # fmt: skip
            example = edit_example(backend.model)
            fill = gr.Button("Example", size="sm", visible=example is not None, elem_id="edit-example")
            prompt = gr.Textbox(label="What the picture shows", lines=2, max_length=2000, elem_id="edit-prompt")
            edits = gr.Textbox(
                label="Changes, one a line", placeholder="red circle = green star", lines=2, max_length=4000,
                info="words of the prompt = other words", elem_id="edit-edits",
            )  # fmt: skip
            target = gr.Textbox(label="Or the whole other prompt", max_length=2000, elem_id="edit-target")
            canvas = draw_canvas("edit-canvas", "drag to confine a change")
            problem = gr.Markdown("", elem_id="edit-problem", elem_classes="problem")
            chooser = draw_chooser(backend, "edit", ["prompt-to-prompt"])
            with gr.Row():
                inversion = gr.Dropdown([*INVERSIONS], value="direct", label="Inversion", min_width=120)
                feather = gr.Number(4, label="Soft edge, pixels", precision=0, minimum=0, maximum=256, min_width=110)
            with gr.Row():
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**53 - 1, min_width=90)
                steps = gr.Slider(1, STEPS, value=50, step=1, label="Steps", min_width=140, elem_id="edit-steps")
                guidance = gr.Number(
                    backend.guidance, label="Guidance scale", info="empty: the model's own", minimum=0, maximum=100,
                    min_width=120,
                )  # fmt: skip
        with gr.Column(scale=5):
            run, stop = draw_buttons("edit")
            panel = draw_panel("edit", run, stop, "Redrawn unchanged", "Edited", maps=False)

    def read(values: tuple) -> tuple[Request, Any]:
        file, prompt, edits, target, canvas, inversion, feather, seed, steps, guidance, *rest = values
        request = Request.read(
            {
                "task": "edit",
                "prompt": prompt,
                "edits": read_edits(edits),
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
        return request, open_picture(file)

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

    def check(prompt: str, canvas: str) -> tuple[Any, str]:
        if not prompt.strip():
            return gr.skip(), ""
        words = gr.HTML(**scene(*backend.words(prompt)))
        try:
            backend.check(prompt, read_places(canvas))
        except ControlError as error:
            return words, plain(str(error))
        return words, ""

    inputs = [given, prompt, edits, target, canvas, inversion, feather, seed, steps, guidance, *chooser.inputs]
    run.click(go, inputs, panel.outputs, show_progress="hidden", concurrency_limit=None, api_visibility="private")
    connect_stop(desk, stop)
    if example is not None:
        picture, wanted = example

        def begin() -> list[Any]:
            """The example's picture, prompt, changes and region."""
            path = desk.outbox.put(picture, backend.model, wanted.data())
            lines = [" = ".join(pair) for pair in wanted.edits]
            return [path, wanted.prompt, "\n".join(lines), "", json.dumps(wanted.data()["regions"])]

        fill.click(
            begin, None, [given, prompt, edits, target, canvas], show_progress="hidden", api_visibility="private"
        )
    given.change(show, given, [canvas, problem], show_progress="hidden", api_visibility="private")
    for event in (prompt.change, canvas.change):
        event(
            check, [prompt, canvas], [canvas, problem], show_progress="hidden", trigger_mode="always_last", queue=False,
            api_visibility="private",
        )  # fmt: skip


def read_edits(text: str) -> list[list[str]]:
    """ "words = other words" a line. Raises ControlError for lines without "="."""
    found = []
    for line in filter(str.strip, text.splitlines()):
        words, equals, other = (part.strip() for part in line.partition("="))
        if not equals or not words:
            raise ControlError(f'the change "{line[:60]}": write words of the prompt = other words.')
        found.append([words, other])
    return found
