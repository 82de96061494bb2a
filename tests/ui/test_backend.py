"""Runs of the page without the page: pictures, snippets, several visitors, stopping."""

from __future__ import annotations

import shlex
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import attnctrl as ac
from attnctrl.cli import main
from attnctrl.encoding import decode_latents
from attnctrl.errors import ControlError
from attnctrl.models import call_arguments, load_pipeline
from attnctrl.ui.backend import Backend
from attnctrl.ui.desk import Desk, sentence
from attnctrl.ui.files import request_in
from attnctrl.ui.jobs import Progress, Stopped
from attnctrl.ui.request import Request
from attnctrl.ui.snippets import command, python
from tests.ui.parts import LAYOUT, PROMPT, backend, drawn, same
from tests.wan import wan_image

REQUEST = Request.read(LAYOUT)
GIVEN = {"num_inference_steps": 4}


def stock(seed: int) -> Image.Image:
    pipe = ac.share(backend().pipe)
    given = {**GIVEN, "generator": torch.Generator().manual_seed(seed)}
    return pipe(**call_arguments(pipe, PROMPT, 3.5, given)).images[0]


@pytest.fixture
def desk() -> Desk:
    return Desk(backend(), at_once=2)


def test_both_pictures_are_those_of_the_library(desk: Desk) -> None:
    steps: list[Progress] = []
    result = drawn(desk, REQUEST, each=steps.append)
    assert same(result.stock, stock(1))
    pipe, regions = ac.share(backend().pipe), [place.region() for place in REQUEST.regions]
    with ac.control(pipe, ac.RegionMask(regions), ac.LoCo(regions, scale=20.0, iterations=1)):
        given = {**GIVEN, "generator": torch.Generator().manual_seed(1)}
        expected = pipe(**call_arguments(pipe, PROMPT, 3.5, given)).images[0]
    assert same(result.controlled, expected)
    assert not same(result.controlled, result.stock)
    assert [phrase for _, phrase in result.overlays] == ["a red circle", "a blue square"]
    assert "LoCo" in result.report
    for what in ("controlled picture", "stock picture"):
        assert [(s.step, s.total) for s in steps if s.what == what] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert steps[0].picture is not None
    assert steps[0].picture.size == (128, 128)


def test_a_snippet_draws_the_same_picture(desk: Desk, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    request = Request.read({**LAYOUT, "phrases": ["circle"], "methods": {"loco": {"window_end": 0.5}, "a-star": {}}})
    exec(python(request, "shapes-sd"), {})
    assert same(Image.open("picture.png"), drawn(desk, request).controlled)
    exec(python(replace(request, methods={}), "shapes-sd"), {})
    assert same(Image.open("picture.png"), stock(1))


def test_the_command_line_draws_the_same_picture(desk: Desk, tmp_path: Path) -> None:
    words = shlex.split(command(REQUEST, "shapes-sd"))
    assert words[:2] == ["attnctrl", "layout"]
    assert main([*words[1:-1], str(tmp_path / "picture.png")]) == 0
    assert same(Image.open(tmp_path / "picture.png"), drawn(desk, REQUEST).controlled)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"methods": {"loco": {"window_end": 0.5}}}, "cannot set a method's window"),
        ({"methods": {"conform": {}}}, "attnctrl layout has no fidelity methods"),
        ({"methods": {"loco": {"scale": 3}, "soft-pag": {}}}, '"scale" belongs to loco and soft-pag'),
        ({"phrases": ["circle"]}, "cannot name phrases"),
        ({"regions": []}, "attnctrl layout needs a region"),
        ({"regions": [{"phrase": "circle", "polygon": [[0, 0], [1, 0], [1, 1]]}]}, "for outlines"),
        ({"task": "explain", "methods": {}}, "has no command for maps"),
    ],
)
def test_what_no_command_can_say_is_said(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ControlError, match="use the Python form") as caught:
        command(Request.read({**LAYOUT, **change}), "shapes-sd")
    assert sentence in str(caught.value)


def test_visitors_at_once_get_what_they_get_alone() -> None:
    """Their steps are interleaved: each waits for the other's."""
    desk = Desk(backend(), at_once=2)
    requests = {"mask": replace(REQUEST, methods={"region-mask": {}}), "loco": replace(REQUEST, seed=5)}
    alone = {name: drawn(desk, request) for name, request in requests.items()}
    barrier, found = threading.Barrier(2, timeout=60), {}  # type: threading.Barrier, dict[str, Any]

    def visit(name: str) -> None:
        found[name] = drawn(desk, requests[name], name, each=lambda event: barrier.wait())

    threads = [threading.Thread(target=visit, args=(name,)) for name in requests]
    for one in threads:
        one.start()
    for one in threads:
        one.join(120)
    for name, result in alone.items():
        assert same(found[name].controlled, result.controlled), name
        assert same(found[name].stock, result.stock), name
        assert found[name].report.split()[:6] == result.report.split()[:6]


def test_stop_ends_the_visitors_own_run_and_no_other(desk: Desk) -> None:
    calls: list[int] = []
    handle = backend().pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    long = replace(REQUEST, methods={"layout-guidance": {"iterations": 50}}, steps=200)

    def stop_me(event: Progress) -> None:
        assert desk.stop("somebody else") == 0
        assert desk.stop("me") == 1

    with pytest.raises(Stopped):
        drawn(desk, long, "me", each=stop_me)
    for thread in threading.enumerate():
        if thread.name == "attnctrl-run":
            thread.join(20)
            assert not thread.is_alive()
    done = len(calls)
    handle.remove()
    assert done < 200, "it went on to the end of the run"
    assert desk.stop("me") == 0
    assert same(drawn(desk, replace(REQUEST, methods={})).stock, stock(1)), "the model is as it was"


def test_a_run_stops_inside_a_step(desk: Desk) -> None:
    """Not at the next step, which losses and searches of the noise may put off for minutes."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            desk.stop("me")

    handle = backend().pipe.unet.register_forward_pre_hook(count)
    long = replace(REQUEST, methods={"layout-guidance": {"iterations": 50}}, steps=50)
    with pytest.raises(Stopped):
        drawn(desk, long, "me")
    handle.remove()
    assert calls <= 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"regions": []}, "loco places objects in regions: draw at least one"),
        ({"regions": [{"phrase": "a cat", "box": [0, 0, 1, 1]}]}, 'the phrase "a cat" is not in the prompt'),
        ({"phrases": ["dog"]}, '"dog" is not in the prompt'),
        ({"prompt": "and", "regions": [], "methods": {"a-star": {}}}, "a-star needs phrases"),
        ({"methods": {"planned": {"plan": "/etc/passwd"}}}, 'planned: there is no file "/etc/passwd"'),
        ({"methods": {"eligen": {}}}, "entities need joint attention"),
    ],
)
def test_what_cannot_be_drawn_says_why_and_the_next_run_is_served(
    desk: Desk, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(ControlError) as caught:
        drawn(desk, Request.read({**LAYOUT, "methods": {"loco": {}}, **change}))
    assert words in sentence(caught.value)
    assert drawn(desk, replace(REQUEST, methods={}, steps=1)).stock is not None


def test_explain_shows_every_word_and_leaves_the_picture_stock(desk: Desk) -> None:
    request = Request.read({"task": "explain", "prompt": PROMPT, "seed": 1, "steps": 4, "guidance": 3.5})
    result = drawn(desk, request)
    assert same(result.stock, stock(1))
    assert [phrase for _, phrase in result.overlays] == ["a", "red", "circle", "and", "blue", "square"]
    named = drawn(desk, replace(request, phrases=("red circle",)))
    assert [phrase for _, phrase in named.overlays] == ["red circle"]
    with pytest.raises(ControlError, match='the phrase "green" is not in the prompt'):
        drawn(desk, replace(request, phrases=("green",)))


def test_an_edit_keeps_what_no_region_covers(desk: Desk, tmp_path: Path, monkeypatch: Any) -> None:
    given = stock(1).resize((120, 128))
    asked = {
        "task": "edit",
        "prompt": PROMPT,
        "edits": [["red circle", "green star"]],
        "regions": [{"phrase": "red circle", "box": [0, 0, 0.5, 1]}],
        "methods": {"prompt-to-prompt": {"self_until": 0.1}, "mutual-self-attention": {"window_end": 0.5}},
        "steps": 4,
        "guidance": 3.5,
        "feather": 0,
    }
    request = Request.read(asked)
    result = drawn(desk, request, pictures=[given])
    assert result.controlled.size == given.size
    assert np.array_equal(np.asarray(result.controlled)[:, 60:], np.asarray(given)[:, 60:])
    assert not same(result.controlled, given)
    monkeypatch.chdir(tmp_path)
    given.save("given.png")
    exec(python(request, "shapes-sd"), {})
    assert same(Image.open("edited.png"), result.controlled)
    free = replace(request, regions=(), methods={"prompt-to-prompt": {"self_until": 0.1}})
    words = shlex.split(command(free, "shapes-sd"))
    assert main([*words[1:-1], "picture.png"]) == 0
    assert same(Image.open("picture.png"), drawn(desk, free, pictures=[given]).controlled)
    wrong = Request.read({**asked, "regions": [{"phrase": "blue square", "box": [0, 0, 1, 1]}]})
    with pytest.raises(ControlError, match='a region is for "blue square", which no edit changes'):
        drawn(desk, wrong, pictures=[given])
    with pytest.raises(ControlError, match="there is no picture"):
        drawn(desk, request)


def test_a_downloaded_picture_brings_its_request_back(desk: Desk) -> None:
    result = drawn(desk, REQUEST)
    path = desk.file(REQUEST, result)
    given = request_in(path)
    assert given.pop("model") == "shapes-sd"
    again = Request.read(given)
    assert again == REQUEST
    assert same(Image.open(path), drawn(desk, again).controlled)


def test_words_are_the_tokenizers() -> None:
    text, words = backend().words("a red circle, and blue")
    assert [text[a:b] for a, b in words] == ["a", "red", "circle", ",", "and", "blue"]
    backend().check(PROMPT, REQUEST.regions)
    with pytest.raises(ControlError, match=r"its tokens are 1:a, 2:red, 3:circle"):
        backend().check("a red circle", REQUEST.regions)


@pytest.mark.slow
def test_joint_attention_has_its_methods_and_its_pictures_on_the_way() -> None:
    one = Backend("shapes-dit").open(lambda: load_pipeline("shapes-dit", device="cpu"))
    request = replace(REQUEST, methods={"regional-flux": {}}, steps=2)
    steps: list[Progress] = []
    result = drawn(Desk(one), request, each=steps.append)
    assert result.controlled.size == one.size == (128, 128)
    assert not same(result.controlled, result.stock)
    assert [s.picture.size for s in steps if s.picture is not None][:1] == [(128, 128)]
    text, words = one.words(PROMPT)
    assert [text[a:b] for a, b in words] == PROMPT.split()


def test_a_decoded_picture_is_the_pipelines() -> None:
    pipe = ac.share(backend().pipe)
    given = {**GIVEN, "generator": torch.Generator().manual_seed(1), "output_type": "latent"}
    latents = pipe(**call_arguments(pipe, PROMPT, 3.5, given)).images
    assert same(decode_latents(pipe, latents)[0], stock(1))


def test_models_of_clips_are_refused_and_so_is_what_waited_for_them() -> None:
    class Clips:
        pass

    one = Backend("clips")
    with pytest.raises(ControlError, match="Clips with NoneType is not supported"):
        one.open(Clips)
    with pytest.raises(ControlError, match="Clips with NoneType is not supported"):
        one.words("a cat")


def test_models_that_begin_with_a_picture_are_refused() -> None:
    with pytest.raises(ControlError, match="WanImageToVideoPipeline begins with a given image, for which the page"):
        Backend("clips").open(wan_image)


def test_what_asks_before_the_model_is_there_waits_for_it() -> None:
    one, found = Backend("shapes-sd"), []  # type: Backend, list[Any]
    asking = threading.Thread(target=lambda: found.append(one.words("a red circle")), daemon=True)
    asking.start()
    asking.join(0.2)
    assert asking.is_alive()
    one.open(lambda: ac.share(backend().pipe))
    asking.join(60)
    assert found == [("a red circle", [(0, 1), (2, 5), (6, 12)])]
