"""The whole page."""

from __future__ import annotations

from typing import Any

import gradio as gr

from attnctrl.ui.api import draw_api
from attnctrl.ui.backend import Backend
from attnctrl.ui.desk import Desk
from attnctrl.ui.edit_tab import draw_edit
from attnctrl.ui.explain_tab import draw_explain
from attnctrl.ui.files import MEGABYTES
from attnctrl.ui.layout_tab import draw_layout
from attnctrl.ui.read_tab import draw_read
from attnctrl.ui.subjects_tab import draw_subjects

TITLE = "attnctrl"
CSS = """
.method-title p { margin: 4px 8px; }
.fields { display: block; }
.fields > .form { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); }
.fields > .form > * { min-width: 0 !important; }
.picture img { width: 100%; height: 100%; object-fit: contain; }
.maps .fixed-height { min-height: 0; max-height: none; }
#video-maps .thumbnail-item { aspect-ratio: auto; }
.status p { font-size: 1.05em; }
.problem p { color: var(--error-text-color, #b91c1c); }
"""


def build_app(backend: Backend, at_once: int = 1, longest: int = 16) -> gr.Blocks:
    """The page on one model. at_once: how many runs work at a time; longest: how many may wait."""
    desk = Desk(backend, at_once, longest)
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 24 * 3600), fill_width=True) as page:
        # Runs have a line of their own, whose places are told; this queue only carries events. It builds the
        # server's routes anew, as the end of this block does: here, while there are few.
        page.queue(max_size=256, default_concurrency_limit=64, api_open=False)
        gr.Markdown(f"## attnctrl: attention control for diffusion models\nModel: `{backend.model}`")
        draw_api(desk)  # first: names of endpoints are given in the order of drawing
        with gr.Tab("Layout", id="layout"):
            draw_layout(desk, "layout", page.load)
        with gr.Tab("Edit", id="edit"):
            draw_edit(desk, page)
        with gr.Tab("Subjects", id="subjects"):
            draw_subjects(desk, page)
        with gr.Tab("Read", id="read"):
            draw_read(desk, page)
        with gr.Tab("Explain", id="explain"):
            draw_explain(desk, page)
        with gr.Tab("Video", id="video") as video:
            draw_layout(desk, "video", video.select)  # its model may be another, which is loaded now

        def leave(request: gr.Request) -> None:
            """A closed page's runs are nobody's."""
            desk.stop(str(request.session_hash))

        page.unload(leave)
    return page


def launch(page: gr.Blocks, host: str = "127.0.0.1", port: int | None = None, **more: Any) -> Any:
    """Serve the page, by default to this machine alone; returns what Gradio's `launch` does."""
    return page.launch(
        server_name=host,
        server_port=port,
        share=False,
        max_file_size=f"{MEGABYTES}mb",
        show_error=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        footer_links=[],
        # Gradio gives its own server three seconds to answer a second time, and on a busy machine takes it for dead.
        _frontend=False,
        css=CSS,
        **more,
    )
