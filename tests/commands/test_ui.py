"""attnctrl ui: what it refuses before it serves, and that it serves."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from attnctrl.cli import main


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--at-once", "0"], "--at-once is 0: give 1 or more"),
        (["--file", "nowhere.json"], "--file nowhere.json: there is no such file"),
        (["--model", "shapes-none"], "unknown shapes model"),
    ],
)
def test_bad_input_ends_with_its_sentence(given: list[str], sentence: str, capsys: Any) -> None:
    assert main(["ui", *given]) == 2
    assert sentence in capsys.readouterr().err


def test_without_gradio_it_says_what_to_install(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr("attnctrl.commands.ui.find_spec", lambda name: None)
    assert main(["ui"]) == 2
    assert "pip install 'attnctrl[ui]'" in capsys.readouterr().err


@pytest.mark.slow
def test_it_serves_the_shipped_model(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "attnctrl.cli", "ui", "--port", str(port), "--device", "cpu"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            assert server.poll() is None, "it ended"
            try:
                if "attnctrl" in httpx.get(f"http://127.0.0.1:{port}/", timeout=20).text:
                    return
            except httpx.TransportError:
                time.sleep(1)
        pytest.fail("it serves nothing")
    finally:
        server.terminate()
        server.wait(60)
