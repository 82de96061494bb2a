"""What a page waits for: not for the model, nor for the libraries that only the model needs."""

from __future__ import annotations

import inspect
import subprocess
import sys

import gradio
import httpx
import pytest
from gradio_client import Client

import attnctrl as ac
from attnctrl.commands.ui import stubs_left_alone
from attnctrl.ui.app import build_app, launch
from attnctrl.ui.backend import Backend
from tests.ui.parts import backend

DRAW = """
import sys
import attnctrl.commands.ui
from attnctrl.ui.app import build_app
from attnctrl.ui.backend import Backend
build_app(Backend("shapes-sd"))
print(*{name.partition(".")[0] for name in sys.modules} & {"diffusers", "transformers", "peft", "accelerate"})
print(*{"torch._dynamo", "attnctrl.shapes.train"} & {*sys.modules})
"""


def test_the_page_is_drawn_without_the_models_libraries() -> None:
    """They take as long to import as all the rest."""
    drawn = subprocess.run([sys.executable, "-c", DRAW], capture_output=True, text=True, check=True)
    assert drawn.stdout.split() == []


def test_only_gradios_own_sources_are_hidden_from_it_and_only_while_it_is_imported() -> None:
    with stubs_left_alone():
        assert inspect.getfile(Backend).endswith("backend.py")
        with pytest.raises(OSError, match="keeps the stub it has"):
            inspect.getfile(gradio.Button)
    assert inspect.getfile(gradio.Button).endswith("button.py")


def test_the_page_is_served_before_its_model_is_there() -> None:
    one = Backend("shapes-sd")
    page = build_app(one)
    _, address, _ = launch(page, prevent_thread_lock=True, quiet=True)
    try:
        assert httpx.get(address, timeout=120).status_code == 200
        job = Client(address, verbose=False).submit({"prompt": "a red circle"}, api_name="/check")
        assert not job.done()
        one.open(lambda: ac.share(backend().pipe))
        assert job.result(timeout=300)["words"] == ["a", "red", "circle"]
    finally:
        page.close()
