"""The Layout tab: a prompt, drawn regions and methods; the stock and the controlled picture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import gradio as gr

from attnctrl.errors import ControlError
from attnctrl.ui.canvas import draw_canvas, scene
from attnctrl.ui.chooser import draw_chooser
from attnctrl.ui.desk import Desk
from attnctrl.ui.examples import examples
from attnctrl.ui.files import request_in
from attnctrl.ui.panel import connect_stop, draw_buttons, draw_numbers, draw_panel, follow, plain
from attnctrl.ui.request import SIDE, Request, read_places


def draw_layout(desk: Desk, page: gr.Blocks) -> None:
    backend = desk.backend
    known = examples(backend.model)
    begin = next(iter(known.values()))
    with gr.Row():
        with gr.Column(scale=4):
            example = gr.Dropdown([*known], value=next(iter(known)), label="Examples", elem_id="layout-example")
            prompt = gr.Textbox(begin.prompt, label="Prompt", lines=2, max_length=2000, elem_id="layout-prompt")
            canvas = draw_canvas("layout-canvas", "drag to draw a region", prompt=begin.prompt)
            canvas.value = _places(begin)
            problem = gr.Markdown("", elem_id="layout-problem", elem_classes="problem")
            chooser = draw_chooser(backend, "layout", [*begin.methods])
            seed, steps, guidance = draw_numbers("layout", backend, begin.seed, begin.steps)
            with gr.Accordion("Size, and phrases for methods that take no regions", open=False):
                phrases = gr.Textbox(
                    ", ".join(begin.phrases), label="Phrases", max_length=2000, elem_id="layout-phrases",
                    info="of the prompt, separated by commas; their heat maps are kept too",
                )  # fmt: skip
                with gr.Row():
                    tall, wide = (
                        gr.Number(
                            None, label=f"{side}, pixels", info="empty: the model's own", precision=0, minimum=64,
                            maximum=SIDE,
                        )
                        for side in ("Height", "Width")
                    )  # fmt: skip
            loaded = gr.UploadButton("Load a downloaded PNG", file_types=[".png"], size="sm", elem_id="layout-load")
        with gr.Column(scale=5):
            run, stop = draw_buttons("layout")
            panel = draw_panel("layout", run, stop, "Stock", "Controlled", "Heat maps of the phrases")

    first = [prompt, canvas, phrases, seed, steps, guidance, tall, wide]
    inputs = [*first, *chooser.inputs]

    def read(values: tuple) -> Request:
        prompt, canvas, phrases, seed, steps, guidance, tall, wide, *rest = values
        given = {"seed": seed, "steps": steps, "guidance": guidance, "height": tall, "width": wide}
        return Request.read(
            {
                "task": "layout",
                "prompt": prompt,
                "regions": [{k: v for k, v in vars(p).items() if v is not None} for p in read_places(canvas)],
                "phrases": [p.strip() for p in phrases.split(",") if p.strip()],
                "methods": chooser.methods(rest),
                **given,
            }
        )

    def go(request: gr.Request, *values: Any) -> Iterator[dict]:
        yield from follow(desk, panel, str(request.session_hash), lambda: (read(values), ()))

    def arrive(prompt: str, chosen: list[str]) -> list[Any]:
        """What is known of the page once the model is there."""
        height, width = backend.size
        drawn = gr.HTML(shape=[width, height], **_scene(desk, prompt))
        return [drawn, chooser.offered(chosen, backend.kinds), "Ready."]

    def check(prompt: str, canvas: str) -> tuple[Any, str]:
        """The words of the prompt for the canvas, and what is wrong with the regions."""
        return (
            (gr.skip(), "") if not prompt.strip() else (gr.HTML(**_scene(desk, prompt)), _problem(desk, prompt, canvas))
        )

    def fill(asked: Request) -> list[Any]:
        """Updates of the inputs, of the forms that are shown, and of the canvas' words."""
        values: list[Any] = [
            asked.prompt,
            gr.HTML(value=_places(asked), **_scene(desk, asked.prompt)),
            ", ".join(asked.phrases),
        ]
        values += [asked.seed, asked.steps, asked.guidance, asked.height, asked.width, *chooser.values(asked.methods)]
        return [*values, *chooser.shown([*asked.methods]), "Ready."]

    def load(path: str) -> list[Any]:
        nothing = [gr.skip() for _ in range(len(inputs) + len(chooser.groups))]
        try:
            given = request_in(path)
            model = given.pop("model")
            asked = Request.read(given)
            if asked.task != "layout":
                raise ControlError(f"the picture was made in the tab {asked.task}.")
        except ControlError as error:
            return [*nothing, f"**Not loaded:** {plain(str(error))}"]
        other = "" if model == backend.model else plain(f" It was made with {model[:200]}; this is {backend.model}.")
        return [*fill(asked)[:-1], f"Loaded.{other}"]

    page.load(
        arrive, [prompt, chooser.chosen], [canvas, chooser.chosen, panel.status], show_progress="hidden",
        api_visibility="private",
    )  # fmt: skip
    filled = [*inputs, *chooser.groups, panel.status]
    run.click(go, inputs, panel.outputs, show_progress="hidden", concurrency_limit=None, api_visibility="private")
    connect_stop(desk, stop)
    for event in (prompt.change, canvas.change):
        event(
            check, [prompt, canvas], [canvas, problem], show_progress="hidden", trigger_mode="always_last", queue=False,
            api_visibility="private",
        )  # fmt: skip
    example.input(lambda name: fill(known[name]), example, filled, show_progress="hidden", api_visibility="private")
    loaded.upload(load, loaded, filled, show_progress="hidden", api_visibility="private")


def _places(asked: Request) -> str:
    return json.dumps(asked.data().get("regions", []))


def _scene(desk: Desk, prompt: str) -> dict[str, Any]:
    return scene(*desk.backend.words(prompt))


def _problem(desk: Desk, prompt: str, canvas: str) -> str:
    try:
        desk.backend.check(prompt, read_places(canvas))
    except ControlError as error:
        return plain(str(error))
    return ""
