"""The Read tab: given pictures are looked at; masks of words and of parts, and a point's counterpart."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import gradio as gr

from attnctrl.errors import ControlError
from attnctrl.pipelines.readout import LATE
from attnctrl.ui.canvas import backdrop, draw_canvas, scene
from attnctrl.ui.chooser import draw_chooser
from attnctrl.ui.desk import Desk
from attnctrl.ui.examples import has_examples, read_example
from attnctrl.ui.files import open_picture
from attnctrl.ui.panel import connect_stop, draw_buttons, draw_panel, follow, plain, usable
from attnctrl.ui.request import STEPS, Request, read_places
from attnctrl.ui.result import Pictures

GIVEN = {"window_start": LATE.start}
"""What the form of `segment` begins with: in given pictures the first steps show noise."""
_FILE: dict[str, Any] = {"file_types": [".png", ".jpg", ".jpeg", ".webp"], "height": 110}


def draw_read(desk: Desk, page: gr.Blocks) -> None:
    backend = desk.backend
    with gr.Row():
        with gr.Column(scale=4):
            fill = gr.Button("Example", size="sm", visible=has_examples(backend.model), elem_id="read-example")
            with gr.Row():
                given = gr.File(label="The picture", elem_id="read-file", min_width=140, **_FILE)
                other = gr.File(label="Another (not for segment)", elem_id="read-other", min_width=140, **_FILE)
            chooser = draw_chooser(backend, "read", ["segment"], most=1)
            for field, begin_with in zip(chooser.inputs, chooser.values({"segment": GIVEN}), strict=True):
                field.value = begin_with
            prompt = gr.Textbox(
                label="What the picture shows", info="for segment", lines=2, max_length=2000, elem_id="read-prompt"
            )
            phrases = gr.Textbox(
                label="Phrases", info="of the prompt, for segment, separated by commas; empty: its nouns",
                max_length=2000, elem_id="read-phrases",
            )  # fmt: skip
            canvas = draw_canvas("read-canvas", "segment-like-me: drag over each part; correspond: around the point")
            problem = gr.Markdown("", elem_id="read-problem", elem_classes="problem")
            with gr.Row():
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**53 - 1, min_width=90)
                steps = gr.Slider(1, STEPS, value=10, step=1, label="Steps", min_width=140, elem_id="read-steps")
        with gr.Column(scale=5):
            run, stop = draw_buttons("read")
            panel = draw_panel("read", run, stop, "What is looked for", "What is found", "Masks")

    first = [given, other, prompt, phrases, canvas, seed, steps]
    inputs = [*first, *chooser.inputs]

    def read(values: tuple) -> tuple[Request, Pictures]:
        file, other, prompt, phrases, canvas, seed, steps, *rest = values
        methods = chooser.methods(rest)
        request = Request.read(
            {
                "task": "read",
                "prompt": prompt,
                "phrases": [p.strip() for p in phrases.split(",") if p.strip()],
                "regions": [
                    {k: v for k, v in vars(p).items() if v is not None} for p in read_places(canvas, named=False)
                ],
                "methods": methods,
                "seed": seed,
                "steps": steps,
            }
        )
        # The second picture may lie ready while the first alone is read.
        return request, [open_picture(path) for path in ((file,) if "segment" in methods else (file, other))]

    def go(request: gr.Request, *values: Any) -> Iterator[dict]:
        yield from follow(desk, panel, str(request.session_hash), lambda: read(values))

    def show(file: str | None) -> tuple[Any, str]:
        """The given picture behind the canvas."""
        try:
            return gr.HTML(**backdrop(None if file is None else open_picture(file))), ""
        except ControlError as error:
            return gr.HTML(**backdrop(None)), plain(str(error))

    def words(prompt: str) -> Any:
        return gr.HTML(**scene(*backend.words(prompt))) if prompt.strip() else gr.skip()

    def begin() -> list[Any]:
        """The example's pictures, prompt, phrases and region."""
        pictures, asked = read_example()
        paths = [desk.outbox.put(picture, backend.model, asked.data()) for picture in pictures]
        return [*paths, asked.prompt, ", ".join(asked.phrases), json.dumps(asked.data()["regions"])]

    def arrive(chosen: list[str]) -> list[Any]:
        drawer, ready = usable(desk, "read")
        return [gr.skip() if drawer is None else chooser.offered(chosen, drawer.kinds), ready]

    page.load(arrive, chooser.chosen, [chooser.chosen, panel.status], show_progress="hidden", api_visibility="private")
    fill.click(begin, None, [given, other, prompt, phrases, canvas], show_progress="hidden", api_visibility="private")
    run.click(go, inputs, panel.outputs, show_progress="hidden", concurrency_limit=None, api_visibility="private")
    connect_stop(desk, stop)
    given.change(show, given, [canvas, problem], show_progress="hidden", api_visibility="private")
    prompt.change(
        words, prompt, canvas, show_progress="hidden", trigger_mode="always_last", queue=False, api_visibility="private"
    )
