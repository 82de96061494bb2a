"""Runs of clips without the page: stock and controlled, on the way, as files, as a program; and whose model draws."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import attnctrl as ac
from attnctrl.errors import ControlError
from attnctrl.maps import Maps
from attnctrl.models import call_arguments, load_pipeline
from attnctrl.shapes import VIDEO_CALL
from attnctrl.ui.backend import Backend
from attnctrl.ui.clips import heated, spread, strip
from attnctrl.ui.desk import Desk
from attnctrl.ui.files import request_in
from attnctrl.ui.jobs import Stopped
from attnctrl.ui.panel import usable
from attnctrl.ui.request import Request
from attnctrl.ui.snippets import command, python
from tests.ui.parts import LAYOUT, PROMPT, backend, drawn, same

VIDEO: dict[str, Any] = {
    **LAYOUT,
    "task": "video",
    "methods": {"region-mask": {}, "radial": {"window_start": 0}},
    "steps": 2,
}
REQUEST = Request.read(VIDEO)


@cache
def clips() -> Backend:
    return Backend("shapes-video").open(lambda: load_pipeline("shapes-video", device="cpu"))


def alike(first: Any, second: Any) -> bool:
    return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))


def stock() -> list[Image.Image]:
    given = {**VIDEO_CALL, "output_type": "pil", "num_inference_steps": 2}
    given["generator"] = torch.Generator().manual_seed(1)
    return ac.share(clips().pipe)(**call_arguments(clips().pipe, PROMPT, 3.5, given)).frames[0]


def test_both_clips_are_those_of_the_library(tmp_path: Path, monkeypatch: Any) -> None:
    desk, steps = Desk(clips()), []  # type: Desk, list[Progress]
    result = drawn(desk, REQUEST, each=steps.append)
    assert alike(result.stock, stock())
    assert len(result.controlled) == 9
    assert not alike(result.controlled, result.stock)
    assert re.search(r"Radial: \d+ calls visited [1-9][0-9]\.\d% of the pairs", result.report)
    assert [phrase for _, phrase in result.overlays] == ["stock", "controlled", "a red circle", "a blue square"]
    assert {picture.size for picture, _ in result.overlays} == {(9 * 128, 128)}
    for what in ("controlled clip", "stock clip"):
        assert [(s.step, s.total) for s in steps if s.what == what] == [(1, 2), (2, 2)]
    assert steps[0].picture is not None
    assert steps[0].picture.size == clips().size == (128, 128)

    path = desk.file(REQUEST, result)
    given = request_in(path)
    assert given.pop("model") == "shapes-video"
    assert Request.read(given) == REQUEST
    assert frames_in(path) == 9
    assert "methods" not in request_in(desk.shown(replace(REQUEST, methods={}), result.stock))

    monkeypatch.chdir(tmp_path)
    exec(python(REQUEST, "shapes-video"), {})
    assert pixels("clip.webp") == pixels(path)
    with pytest.raises(ControlError, match="no command for clips: use the Python form"):
        command(REQUEST, "shapes-video")


def frames_in(path: str) -> int:
    with Image.open(path) as clip:
        return int(clip.n_frames)


def pixels(path: str) -> list[bytes]:
    found = []
    with Image.open(path) as clip:
        for index in range(clip.n_frames):
            clip.seek(index)
            found.append(clip.convert("RGB").tobytes())
    return found


def test_a_clip_is_stopped_on_its_way() -> None:
    desk = Desk(clips())
    with pytest.raises(Stopped):
        drawn(desk, REQUEST, each=lambda event: desk.stop("me"))


def test_a_page_of_pictures_draws_clips_with_the_shipped_model(monkeypatch: Any) -> None:
    """Which is loaded once, and not before it is asked for."""
    loaded: list[str] = []

    def load(model: str, **given: Any) -> Any:
        loaded.append(model)
        return ac.share(clips().pipe)

    monkeypatch.setattr("attnctrl.ui.desk.load_pipeline", load)
    desk = Desk(backend())
    assert desk.drawer("layout") is desk.drawer("edit") is backend()
    assert loaded == []
    result = drawn(desk, replace(REQUEST, methods={}, steps=1))
    assert len(result.stock) == 9
    assert result.controlled is None
    assert desk.drawer("video").model == "shapes-video"
    assert loaded == ["shapes-video"]
    assert desk.drawer("layout") is backend()


def test_a_page_of_clips_says_so_in_the_other_tabs() -> None:
    desk = Desk(clips())
    assert desk.drawer("video") is clips()
    assert usable(desk, "video")[1] == "Ready."
    for task in ("layout", "edit", "subjects", "read", "explain"):
        none, why = usable(desk, task)
        assert none is None
        assert why == "shapes-video draws clips: this tab needs a model that draws pictures."
    with pytest.raises(ControlError, match="this tab needs a model that draws pictures"):
        drawn(desk, Request.read(LAYOUT))


def test_rows_of_frames() -> None:
    assert spread(9) == [*range(9)]
    assert spread(1) == [0]
    assert spread(81) == [0, 10, 20, 30, 40, 50, 60, 70, 80]
    clip = [Image.new("RGB", (8, 4), (number, 0, 0)) for number in range(17)]
    assert [strip(clip).getpixel((8 * place, 0))[0] for place in range(9)] == [*range(0, 17, 2)]
    assert strip([Image.new("RGB", (1024, 512))]).size == (512, 256)


def test_heat_is_of_each_frame_and_of_one_scale() -> None:
    """Two latent frames, the second of which has all the heat, stand for four frames."""
    maps = Maps(phrases=("cat",))
    heat = torch.zeros(1, 1, 2, 2, 2)
    heat[..., 1, :, :] = 1.0
    maps.add(0, "one", heat.flatten(2), (2, 2, 2))
    row = np.asarray(heated([Image.new("RGB", (8, 8))] * 4, maps, "cat", strength=1.0)).astype(int)
    sums = [int(row[:, 8 * place : 8 * place + 8].sum()) for place in range(4)]
    assert sums[0] == sums[1] < sums[2] == sums[3]
