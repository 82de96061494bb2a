"""The Layout and the Video tab: a prompt, drawn regions and methods; the stock and the controlled picture or clip."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from attnctrl.errors import ControlError
from attnctrl.ui.canvas import draw_canvas
from attnctrl.ui.chooser import draw_chooser
from attnctrl.ui.desk import Desk
from attnctrl.ui.examples import CLIPS, examples
from attnctrl.ui.files import request_in
from attnctrl.ui.panel import (
    LOADING,
    connect_check,
    connect_stop,
    draw_buttons,
    draw_numbers,
    draw_panel,
    follow,
    plain,
    usable,
)
from attnctrl.ui.request import SIDE, Request, read_places


def draw_layout(desk: Desk, task: str, arrival: Callable) -> None:
    """task: "layout" or "video". arrival: the event by which the tab is opened, and its model asked for."""
    backend, clips = desk.backend, task == "video"
    known = CLIPS if clips else examples(backend.model)
    file = "WebP" if clips else "PNG"
    begin = next(iter(known.values()))
    with gr.Row():
        with gr.Column(scale=4):
            example = gr.Dropdown([*known], value=next(iter(known)), label="Examples", elem_id=f"{task}-example")
            prompt = gr.Textbox(begin.prompt, label="Prompt", lines=2, max_length=2000, elem_id=f"{task}-prompt")
            canvas = draw_canvas(f"{task}-canvas", "drag to draw a region", prompt=begin.prompt)
            canvas.value = _places(begin)
            problem = gr.Markdown("", elem_id=f"{task}-problem", elem_classes="problem")
            chooser = draw_chooser(backend, task, [*begin.methods])
            seed, steps, guidance = draw_numbers(task, backend, begin.seed, begin.steps)
            with gr.Accordion("Size, and phrases for methods that take no regions", open=False):
                phrases = gr.Textbox(
                    ", ".join(begin.phrases), label="Phrases", max_length=2000, elem_id=f"{task}-phrases",
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
            loaded = gr.UploadButton(
                f"Load a downloaded {file}", file_types=[f".{file.lower()}"], size="sm", elem_id=f"{task}-load"
            )
        with gr.Column(scale=5):
            run, stop = draw_buttons(task)
            maps = "Frames, and heat maps of the phrases over them" if clips else "Heat maps of the phrases"
            panel = draw_panel(task, run, stop, "Stock", "Controlled", maps, columns=1 if clips else 4, file=file)

    first = [prompt, canvas, phrases, seed, steps, guidance, tall, wide]
    inputs = [*first, *chooser.inputs]

    def read(values: tuple) -> Request:
        prompt, canvas, phrases, seed, steps, guidance, tall, wide, *rest = values
        given = {"seed": seed, "steps": steps, "guidance": guidance, "height": tall, "width": wide}
        return Request.read(
            {
                "task": task,
                "prompt": prompt,
                "regions": [{k: v for k, v in vars(p).items() if v is not None} for p in read_places(canvas)],
                "phrases": [p.strip() for p in phrases.split(",") if p.strip()],
                "methods": chooser.methods(rest),
                **given,
            }
        )

    def go(request: gr.Request, *values: Any) -> Iterator[dict]:
        yield from follow(desk, panel, str(request.session_hash), lambda: (read(values), ()))

    def arrive(status: str, chosen: list[str]) -> list[Any]:
        """What is known of the tab once the model is there."""
        if status != LOADING:
            return [gr.skip(), gr.skip(), gr.skip()]
        drawer, ready = usable(desk, task)
        if drawer is None:
            return [gr.skip(), gr.skip(), ready]
        height, width = drawer.size
        return [gr.HTML(shape=[width, height]), chooser.offered(chosen, drawer.kinds), ready]

    def fill(asked: Request) -> list[Any]:
        """Updates of the inputs and of the forms that are shown; the canvas' words follow by the prompt's check."""
        values: list[Any] = [asked.prompt, gr.HTML(value=_places(asked)), ", ".join(asked.phrases)]
        values += [asked.seed, asked.steps, asked.guidance, asked.height, asked.width, *chooser.values(asked.methods)]
        return [*values, *chooser.shown([*asked.methods]), usable(desk, task)[1]]

    def load(path: str) -> list[Any]:
        nothing = [gr.skip() for _ in range(len(inputs) + len(chooser.groups))]
        try:
            given = request_in(path)
            model = given.pop("model")
            asked = Request.read(given)
            if asked.task != task:
                raise ControlError(f"the picture was made in the tab {asked.task}.")
            mine = desk.drawer(task).model
        except ControlError as error:
            return [*nothing, f"**Not loaded:** {plain(str(error))}"]
        other = "" if model == mine else plain(f" It was made with {model[:200]}; this is {mine}.")
        return [*fill(asked)[:-1], f"Loaded.{other}"]

    arrival(
        arrive, [panel.status, chooser.chosen], [canvas, chooser.chosen, panel.status], show_progress="hidden",
        api_visibility="private",
    )  # fmt: skip
    filled = [*inputs, *chooser.groups, panel.status]
    run.click(go, inputs, panel.outputs, show_progress="hidden", concurrency_limit=None, api_visibility="private")
    connect_stop(desk, stop)
    connect_check(desk, task, prompt, canvas, problem, arrival)
    example.input(lambda name: fill(known[name]), example, filled, show_progress="hidden", api_visibility="private")
    loaded.upload(load, loaded, filled, show_progress="hidden", api_visibility="private")


def _places(asked: Request) -> str:
    return json.dumps(asked.data().get("regions", []))
