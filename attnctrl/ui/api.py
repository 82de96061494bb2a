"""The page's functions by name, for programs: requests as JSON, pictures as PNG, clips as WebP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import gradio as gr

from attnctrl.controls import REGISTRY
from attnctrl.errors import ControlError
from attnctrl.fields import entries
from attnctrl.ui.desk import Desk, sentence
from attnctrl.ui.files import open_picture, open_pictures
from attnctrl.ui.jobs import Progress, Waiting
from attnctrl.ui.request import Request


def draw_api(desk: Desk) -> None:
    """Endpoints for every tab, /check, /methods and /stop, with components that no page shows."""
    asked, file = gr.JSON(visible=False), gr.File(visible=False)
    files = gr.File(file_count="multiple", visible=False)
    stock, controlled = gr.Image(format="png", visible=False), gr.Image(format="png", visible=False)
    maps, told = gr.Gallery(format="png", visible=False), gr.JSON(visible=False)
    pictures = [stock, controlled, maps, told]

    def runner(task: str) -> Callable[..., Iterator[tuple]]:
        def run(request: gr.Request, given: Any, paths: Any = None) -> Iterator[tuple]:
            try:
                wanted = Request.read({**given, "task": task} if isinstance(given, dict) else given)
                pictures = [open_picture(paths)] if task == "edit" else open_pictures(paths)
                for event in desk.run(wanted, str(request.session_hash), pictures):
                    if isinstance(event, Waiting):
                        yield None, None, None, {"waiting": event.position}
                    elif isinstance(event, Progress):
                        yield None, None, None, {"what": event.what, "step": event.step, "total": event.total}
                    else:
                        python, command = desk.snippets(wanted, event)
                        about = {"report": event.report, "python": python, "command": command}
                        stock = desk.shown(replace(wanted, methods={}), event.stock)
                        controlled = desk.shown(wanted, event.controlled)
                        yield stock, controlled, event.overlays, {"request": wanted.data(), **about}
            except Exception as error:
                raise _refusal(error) from None

        return run

    _endpoint("layout", runner("layout"), [asked], pictures)
    _endpoint("edit", runner("edit"), [asked, file], pictures)
    _endpoint("subjects", runner("subjects"), [asked, files], pictures)
    _endpoint("read", runner("read"), [asked, files], pictures)
    _endpoint("explain", runner("explain"), [asked], pictures)
    _endpoint("video", runner("video"), [asked], pictures)

    def check(given: Any) -> dict[str, Any]:
        """Of {"prompt", "regions"}, and "task" for another tab: the prompt's words, and what is wrong, or nothing."""
        try:
            wanted = Request.read(given)
            backend = desk.drawer(wanted.task)
            text, words = backend.words(wanted.prompt)
            backend.check(wanted.prompt, wanted.regions)
        except ControlError as error:
            return {"words": [], "problem": str(error)}
        except Exception as error:
            raise _refusal(error) from None
        return {"words": [text[a:b] for a, b in words], "problem": ""}

    def methods() -> list[dict[str, Any]]:
        """Every registered method with the fields of its form."""
        return [
            {
                "name": m.name,
                "task": m.task,
                "fixes": m.control.fixes,
                "paper": m.control.paper,
                "fields": [{**asdict(e), "default": e.write(e.default)} for e in entries(m)],
            }
            for m in REGISTRY.values()
        ]

    def stop(request: gr.Request) -> dict[str, int]:
        """Stop this session's runs, those in line too; how many there were."""
        return {"stopped": desk.stop(str(request.session_hash))}

    _endpoint("check", check, [asked], [told])
    _endpoint("methods", methods, [], [told])
    _endpoint("stop", stop, [], [told])


def _endpoint(name: str, function: Callable, inputs: list[Any], outputs: list[Any]) -> None:
    gr.Button(visible=False).click(function, inputs, outputs, api_name=name, concurrency_limit=None)


def _refusal(error: Exception) -> gr.Error:
    return gr.Error(sentence(error), print_exception=False)
