"""A server of the page, on a port of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before Gradio is imported


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    from attnctrl.ui.app import build_app, launch
    from tests.ui.parts import backend

    page = build_app(backend(), at_once=2)
    _, url, _ = launch(page, prevent_thread_lock=True, quiet=True)
    yield url.rstrip("/")
    page.close()
