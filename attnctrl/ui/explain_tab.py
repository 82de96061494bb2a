"""The Explain tab: where the words of a prompt are in the stock picture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from attnctrl.ui.desk import Desk
from attnctrl.ui.examples import examples
from attnctrl.ui.panel import connect_stop, draw_buttons, draw_panel, follow
from attnctrl.ui.request import STEPS, Request


def draw_explain(desk: Desk) -> None:
    begin = next(iter(examples(desk.backend.model).values()))
    with gr.Row():
        with gr.Column(scale=4):
            prompt = gr.Textbox(begin.prompt, label="Prompt", lines=2, max_length=2000, elem_id="explain-prompt")
            phrases = gr.Textbox(
                label="Phrases", info="of the prompt, separated by commas; empty: every word", max_length=2000,
                elem_id="explain-phrases",
            )  # fmt: skip
            with gr.Row():
                seed = gr.Number(begin.seed, label="Seed", precision=0, minimum=0, maximum=2**53 - 1, min_width=90)
                steps = gr.Slider(1, STEPS, value=25, step=1, label="Steps", min_width=140)
                guidance = gr.Number(
                    desk.backend.guidance, label="Guidance scale", info="empty: the model's own", minimum=0,
                    maximum=100, min_width=120,
                )  # fmt: skip
        with gr.Column(scale=5):
            run, stop = draw_buttons("explain")
            panel = draw_panel("explain", run, stop, "Stock", None, maps=True)

    def read(prompt: str, phrases: str, seed: Any, steps: Any, guidance: Any) -> tuple[Request, None]:
        named = [p.strip() for p in phrases.split(",") if p.strip()]
        given = {"task": "explain", "prompt": prompt, "phrases": named}
        return Request.read({**given, "seed": seed, "steps": steps, "guidance": guidance}), None

    def go(request: gr.Request, *values: Any) -> Iterator[dict]:
        yield from follow(desk, panel, str(request.session_hash), lambda: read(*values))

    inputs = [prompt, phrases, seed, steps, guidance]
    run.click(go, inputs, panel.outputs, show_progress="hidden", concurrency_limit=None, api_visibility="private")
    connect_stop(desk, stop)
