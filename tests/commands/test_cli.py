"""The command line as a whole: what it imports, and how it ends on bad input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from attnctrl.cli import COMMANDS, main

HEAVY = ("diffusers", "transformers", "gradio", "torch._dynamo")


def test_listing_methods_imports_no_model_library() -> None:
    """They take seconds; a pipeline brings them along when there is one."""
    program = (
        "import sys; from attnctrl.cli import main; main(['methods']); "
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.strip().splitlines()[-1] == "[]"
    assert "region-mask" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert COMMANDS[command][1] in " ".join(capsys.readouterr().out.split())


def test_all_commands_are_listed(capsys: Any) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in COMMANDS)
    with pytest.raises(SystemExit, match="2"):
        main(["nothing"])
    assert "invalid choice: 'nothing'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["sd", "--steps", "3"], "sd has 4 stages (autoencoder, text, denoiser, decoder), but 1 numbers were given."),
        (["sd", "--minutes", "3", "4"], "sd has 4 stages (autoencoder, text, denoiser, decoder), but 2 numbers were"),
        (["dit", "--steps", "0"], "0 steps were given: give 1 or more."),
    ],
)
def test_train_shapes_refuses_bad_numbers_with_a_sentence(
    given: list[str], sentence: str, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    assert main(["train-shapes", *given, "--out", str(out)]) == 2
    assert capsys.readouterr().err.startswith(f"attnctrl train-shapes: {sentence}")
    assert not out.exists()
