"""The right half of a tab: status, pictures, maps, report, snippets, download; and a run as updates of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from attnctrl.errors import ControlError
from attnctrl.ui.backend import Backend
from attnctrl.ui.canvas import scene
from attnctrl.ui.desk import Desk, sentence
from attnctrl.ui.jobs import Progress, Stopped, Waiting
from attnctrl.ui.request import STEPS, Request, read_places
from attnctrl.ui.result import Pictures, Result

LOADING = "The model is loading ..."


@dataclass(frozen=True)
class Panel:
    """Components of one tab's results. second and maps are None in tabs that have none."""

    status: Any
    first: Any
    second: Any
    maps: Any
    report: Any
    python: Any
    command: Any
    download: Any
    run: Any
    stop: Any

    @property
    def outputs(self) -> list[Any]:
        parts = (self.status, self.first, self.second, self.maps, self.report, self.python, self.command, self.download)
        return [part for part in (*parts, self.run, self.stop) if part is not None]


def draw_buttons(name: str) -> tuple[Any, Any]:
    """The buttons that start and stop a run."""
    with gr.Row():
        run = gr.Button("Run", variant="primary", elem_id=f"{name}-run")
        stop = gr.Button("Stop", interactive=False, elem_id=f"{name}-stop")
    return run, stop


def draw_numbers(name: str, backend: Backend, seed: int, steps: int) -> list[Any]:
    """Seed, steps and guidance scale, in this order."""
    with gr.Row():
        return [
            gr.Number(seed, label="Seed", precision=0, minimum=0, maximum=2**53 - 1, min_width=90),
            gr.Slider(1, STEPS, value=steps, step=1, label="Steps", min_width=140, elem_id=f"{name}-steps"),
            gr.Number(
                backend.guidance, label="Guidance scale", info="empty: the model's own", minimum=0, maximum=100,
                min_width=120,
            ),
        ]  # fmt: skip


def draw_panel(
    name: str,
    run: Any,
    stop: Any,
    first: str,
    second: str | None,
    maps: str | None,
    columns: int = 4,
    file: str = "PNG",
) -> Panel:
    """first, second: what the pictures are; second is None for one alone. maps: what the further pictures are, and in
    how many columns they stand. file: what is downloaded.
    """
    status = gr.Markdown(LOADING, elem_id=f"{name}-status", elem_classes="status")
    with gr.Row():
        pictures = [
            gr.Image(
                label=label, format="png", interactive=False, height=360, elem_id=f"{name}-picture{i}",
                elem_classes="picture", buttons=["fullscreen"],
            )
            for i, label in enumerate((first, second))
            if label is not None
        ]  # fmt: skip
    gallery = None
    if maps is not None:
        with gr.Accordion(maps, open=True):
            gallery = gr.Gallery(
                format="png",
                columns=columns,
                height="auto",
                object_fit="contain",
                show_label=False,
                elem_id=f"{name}-maps",
                elem_classes="maps",
            )
    download = gr.DownloadButton(f"Download {file} with its parameters", interactive=False, elem_id=f"{name}-download")
    with gr.Accordion("This run as a program or a command line", open=False):
        python = gr.Code(language="python", label="Python", interactive=False, elem_id=f"{name}-python")
        command = gr.Code(language="shell", label="Command line", interactive=False, elem_id=f"{name}-command")
    with gr.Accordion("Report: what acted where, and what it cost", open=False):
        report = gr.Code(language=None, show_label=False, interactive=False, elem_id=f"{name}-report")
    other = pictures[1] if second is not None else None
    return Panel(status, pictures[0], other, gallery, report, python, command, download, run, stop)


def follow(
    desk: Desk, panel: Panel, visitor: str, asked: Callable[[], tuple[Request, Pictures]]
) -> Iterator[dict[Any, Any]]:
    """A run from the page's values to its pictures, as updates of the panel; it ends with a sentence in any case.

    asked: reads the request, and the pictures that it is about.
    """
    yield {
        panel.run: gr.update(interactive=False),
        panel.stop: gr.update(interactive=True),
        panel.status: "Reading ...",
    }
    try:
        request, pictures = asked()
        python, command = desk.snippets(request)
        blank = {part: None for part in (panel.first, panel.second, panel.maps) if part is not None}
        yield {**blank, panel.python: python, panel.command: command, panel.download: gr.update(interactive=False)}
        where = ""
        for event in desk.run(request, visitor, pictures):
            if isinstance(event, Waiting):
                yield {panel.status: f"Waiting: number {event.position} in line."}
            elif isinstance(event, Progress):
                where = f" after step {event.step} of {event.total} of the {event.what}"
                yield _progress(panel, event)
            else:
                yield _finished(desk, panel, request, event)
    except Exception as error:
        text = sentence(error)
        why = f"Stopped{where}." if isinstance(error, Stopped) else f"**Not drawn:** {plain(text)}"
        yield {panel.status: why}
    yield {panel.run: gr.update(interactive=True), panel.stop: gr.update(interactive=False)}


def usable(desk: Desk, task: str) -> tuple[Backend | None, str]:
    """The backend of a tab once its model is there, or None and a sentence that says why there is none."""
    try:
        return desk.drawer(task), "Ready."
    except ControlError as error:
        return None, plain(str(error))


def connect_check(desk: Desk, task: str, prompt: Any, canvas: Any, problem: Any, *arrivals: Any) -> None:
    """Let the canvas have the words of the prompt, and `problem` say what is wrong with the regions.

    arrivals: events that ask for it besides changes. All are one listener, which answers one after the other: of two
    listeners the one that read the older prompt might answer last.
    """

    def check(prompt: str, canvas: str) -> tuple[Any, str]:
        if not prompt.strip():
            return gr.skip(), ""
        backend, why = usable(desk, task)
        if backend is None:
            return gr.skip(), why
        words = gr.HTML(**scene(*backend.words(prompt)))
        try:
            backend.check(prompt, read_places(canvas))
        except ControlError as error:
            return words, plain(str(error))
        return words, ""

    gr.on(
        [*arrivals, prompt.change, canvas.change], check, [prompt, canvas], [canvas, problem], show_progress="hidden",
        trigger_mode="always_last", queue=False, api_visibility="private",
    )  # fmt: skip


def connect_stop(desk: Desk, button: Any) -> None:
    """Let the button stop its visitor's runs, also those in line."""

    def stop(request: gr.Request) -> None:
        desk.stop(str(request.session_hash))

    button.click(stop, None, None, queue=False, api_visibility="private")


def _progress(panel: Panel, event: Progress) -> dict[Any, Any]:
    update: dict[Any, Any] = {panel.status: f"Step {event.step} of {event.total} of the {event.what}."}
    if event.picture is not None:
        second = panel.second is not None and not event.what.startswith("stock")
        update[panel.second if second else panel.first] = event.picture
    return update


def _finished(desk: Desk, panel: Panel, request: Request, result: Result) -> dict[Any, Any]:
    python, command = desk.snippets(request, result)
    update: dict[Any, Any] = {
        panel.status: "Done.",
        # A clip's file holds what drew it: the stock one no method.
        panel.first: desk.shown(replace(request, methods={}), result.stock),
        panel.report: result.report or "no control acted",
        panel.python: python,
        panel.command: command,
        panel.download: gr.update(value=desk.file(request, result), interactive=True),
    }
    if panel.second is not None:
        update[panel.second] = desk.shown(request, result.controlled)
    if panel.maps is not None:
        update[panel.maps] = result.overlays
    return update


def plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|~$" else c for c in text.replace("\n", " "))
