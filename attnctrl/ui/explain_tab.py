"""The Explain tab: where the words of a prompt are in the stock picture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from attnctrl.ui.desk import Desk
from attnctrl.ui.examples import examples
from attnctrl.ui.panel import connect_stop, draw_buttons, draw_numbers, draw_panel, follow, usable
from attnctrl.ui.request import Request


def draw_explain(desk: Desk, page: gr.Blocks) -> None:
    begin = next(iter(examples(desk.backend.model).values()))
    with gr.Row():
        with gr.Column(scale=4):
            prompt = gr.Textbox(begin.prompt, label="Prompt", lines=2, max_length=2000, elem_id="explain-prompt")
            phrases = gr.Textbox(
                label="Phrases", info="of the prompt, separated by commas; empty: every word", max_length=2000,
                elem_id="explain-phrases",
            )  # fmt: skip
            seed, steps, guidance = draw_numbers("explain", desk.backend, begin.seed, 25)
        with gr.Column(scale=5):
            run, stop = draw_buttons("explain")
            panel = draw_panel("explain", run, stop, "Stock", None, "Heat maps of the phrases")

    def read(prompt: str, phrases: str, seed: Any, steps: Any, guidance: Any) -> tuple[Request, tuple]:
        named = [p.strip() for p in phrases.split(",") if p.strip()]
        given = {"task": "explain", "prompt": prompt, "phrases": named}
        return Request.read({**given, "seed": seed, "steps": steps, "guidance": guidance}), ()

    def go(request: gr.Request, *values: Any) -> Iterator[dict]:
        yield from follow(desk, panel, str(request.session_hash), lambda: read(*values))

    def arrive() -> str:
        return usable(desk, "explain")[1]

    page.load(arrive, None, panel.status, show_progress="hidden", api_visibility="private")
    inputs = [prompt, phrases, seed, steps, guidance]
    run.click(go, inputs, panel.outputs, show_progress="hidden", concurrency_limit=None, api_visibility="private")
    connect_stop(desk, stop)
