"""A training stage that is interrupted and continued, against the same one in one go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from attnctrl.shapes.budget import Stage


def check_resumed(stage: Callable[[Path, bool], Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """stage: with a directory and whether to resume, trains four steps and returns the module."""
    whole = stage(folder / "whole", False).state_dict()
    advance = Stage.advance

    def stop_after_two(self: Stage) -> None:
        advance(self)
        if self.step == 2:
            self.save()
            raise KeyboardInterrupt

    monkeypatch.setattr(Stage, "advance", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        stage(folder / "halves", False)
    monkeypatch.setattr(Stage, "advance", advance)
    resumed = stage(folder / "halves", True).state_dict()
    for name, value in whole.items():
        assert torch.allclose(value, resumed[name], atol=1e-6), name
