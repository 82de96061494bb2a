"""The Subjects tab: pictures of what words of the prompt mean, and a picture that shows just these."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import gradio as gr

from attnctrl.errors import ControlError
from attnctrl.pipelines.subjects import NOISES
from attnctrl.ui.canvas import draw_canvas
from attnctrl.ui.chooser import draw_chooser
from attnctrl.ui.desk import Desk
from attnctrl.ui.examples import has_examples, subjects_example
from attnctrl.ui.files import FORMATS, open_pictures
from attnctrl.ui.panel import connect_check, connect_stop, draw_buttons, draw_numbers, draw_panel, follow, usable
from attnctrl.ui.request import Request, read_places
from attnctrl.ui.result import Pictures
from attnctrl.words import WAYS

SLOTS = 3
"""Subjects for which there are fields."""


def draw_subjects(desk: Desk, page: gr.Blocks) -> None:
    backend = desk.backend
    with gr.Row():
        with gr.Column(scale=4):
            fill = gr.Button("Example", size="sm", visible=has_examples(backend.model), elem_id="subjects-example")
            prompt = gr.Textbox(label="Prompt", lines=2, max_length=2000, elem_id="subjects-prompt")
            slots = [_draw_slot(number) for number in range(1, SLOTS + 1)]
            canvas = draw_canvas("subjects-canvas", "drag to say where a subject belongs")
            problem = gr.Markdown("", elem_id="subjects-problem", elem_classes="problem")
            chooser = draw_chooser(backend, "subjects", ["magic-face"])
            words = gr.Dropdown([*WAYS], value=WAYS[0], label="Words, where a method wants them")
            noise = gr.Dropdown([*NOISES], value="one", label="Noise of the references")
            seed, steps, guidance = draw_numbers("subjects", backend, 0, 25)
        with gr.Column(scale=5):
            run, stop = draw_buttons("subjects")
            panel = draw_panel("subjects", run, stop, "Stock", "With its subjects", "Heat maps, and the references")

    fields = [one for slot in slots for one in slot]
    first = [prompt, canvas, words, noise, seed, steps, guidance, *fields]
    inputs = [*first, *chooser.inputs]

    def read(values: tuple) -> tuple[Request, Pictures]:
        prompt, canvas, words, noise, seed, steps, guidance, *rest = values
        given = [rest[i : i + 3] for i in range(0, 3 * SLOTS, 3)]
        sitters, pictures = read_slots(given)
        request = Request.read(
            {
                "task": "subjects",
                "prompt": prompt,
                "subjects": sitters,
                "regions": [{k: v for k, v in vars(p).items() if v is not None} for p in read_places(canvas)],
                "methods": chooser.methods(rest[3 * SLOTS :]),
                "words": words,
                "noise": noise,
                "seed": seed,
                "steps": steps,
                "guidance": guidance,
            }
        )
        return request, pictures

    def go(request: gr.Request, *values: Any) -> Iterator[dict]:
        yield from follow(desk, panel, str(request.session_hash), lambda: read(values))

    def begin() -> list[Any]:
        """The example's prompt, regions, pictures with their words, and methods."""
        pictures, asked = subjects_example()
        slots: list[Any] = []
        for one, picture in zip(asked.subjects, pictures, strict=True):
            slots += [[desk.outbox.put(picture, backend.model, asked.data())], one.phrase, one.strength]
        slots += [None, "", 1.0] * (SLOTS - len(pictures))
        values = [asked.prompt, json.dumps(asked.data()["regions"]), asked.words, asked.noise, asked.seed]
        methods = *chooser.values(asked.methods), *chooser.shown([*asked.methods])
        return [*values, asked.steps, asked.guidance, *slots, *methods]

    def arrive(chosen: list[str]) -> list[Any]:
        drawer, ready = usable(desk, "subjects")
        if drawer is None:
            return [gr.skip(), gr.skip(), ready]
        height, width = drawer.size
        return [gr.HTML(shape=[width, height]), chooser.offered(chosen, drawer.kinds), ready]

    page.load(
        arrive, chooser.chosen, [canvas, chooser.chosen, panel.status], show_progress="hidden",
        api_visibility="private",
    )  # fmt: skip
    fill.click(begin, None, [*inputs, *chooser.groups], show_progress="hidden", api_visibility="private")
    run.click(go, inputs, panel.outputs, show_progress="hidden", concurrency_limit=None, api_visibility="private")
    connect_stop(desk, stop)
    connect_check(desk, "subjects", prompt, canvas, problem)


def _draw_slot(number: int) -> list[Any]:
    """The fields of one subject: its pictures, its words, how much of it."""
    with gr.Accordion(f"Subject {number}", open=number < SLOTS):
        pictures = gr.File(
            label="Its pictures; transparency is its mask", file_count="multiple", height=110,
            file_types=[".png", ".jpg", ".jpeg", ".webp"], elem_id=f"subjects-file{number}",
        )  # fmt: skip
        with gr.Row():
            phrase = gr.Textbox(
                label="Words of the prompt that mean it", max_length=200, elem_id=f"subjects-phrase{number}",
                min_width=160,
            )  # fmt: skip
            strength = gr.Slider(0, 10, value=1.0, step=0.05, label="Strength", min_width=120)
    return [pictures, phrase, strength]


def read_slots(slots: list[list[Any]]) -> tuple[list[dict[str, Any]], Pictures]:
    """Subjects and their pictures, in order, from the fields of each: files, words, strength.

    Raises ControlError for a subject with pictures and no words or the reverse, and as `open_pictures` does.
    """
    sitters, pictures = [], []
    for number, (files, phrase, strength) in enumerate(slots, 1):
        words = phrase.strip() if isinstance(phrase, str) else phrase
        if not files and not words:
            continue
        if not files:
            raise ControlError(f"subject {number} has no picture: upload one, {', '.join(FORMATS)}.")
        if not words:
            raise ControlError(f"subject {number} has no words: write the words of the prompt that mean it.")
        opened = open_pictures(files)
        sitters.append({"phrase": words, "pictures": len(opened), "strength": strength})
        pictures += opened
    return sitters, pictures
