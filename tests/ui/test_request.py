"""Requests: what comes in is checked, and what goes out comes back the same."""

from __future__ import annotations

import json
from typing import Any

import pytest

from attnctrl.errors import ControlError
from attnctrl.ui.request import Move, Place, Request, Sitter, read_places

FULL = Request(
    task="layout",
    prompt="a cat and a dog",
    regions=(Place("a cat", (0.0, 0.1, 0.5, 0.9)), Place("a dog", polygon=((0.5, 0.0), (1.0, 0.0), (0.75, 1.0)))),
    methods={"loco": {"scale": 5.0}, "soft-pag": {"heads": [("up", 1)]}, "sliding-tile": {"tile": (2, 4, 4)}},
    phrases=("cat",),
    seed=7,
    steps=3,
    guidance=2.5,
    height=64,
    width=128,
)
EDIT = Request(task="edit", prompt="a cat", edits=(("cat", "dog"),), inversion="ddim", feather=0)
MOVE = Request(
    task="edit",
    prompt="a cat",
    regions=(Place("cat", (0.0, 0.0, 0.5, 0.5)),),
    moves=(Move("cat", 0.25, -0.5, 2.0), Move("dog", remove=True)),
    methods={"design-edit": {"pull": 0.5}},
)
SUBJECTS = Request(
    task="subjects",
    prompt="a cat and a dog",
    subjects=(Sitter("a cat", 2, 0.5), Sitter("a dog")),
    methods={"magic-face": {}, "region-mask": {}},
    noise="fresh",
    words="found",
)
READ = Request(task="read", prompt="a cat", methods={"segment": {"threshold": 0.25}}, phrases=("cat",))


@pytest.mark.parametrize("request_", [FULL, EDIT, MOVE, SUBJECTS, READ, Request(task="explain", prompt="a cat")])
def test_a_request_comes_back_from_its_data(request_: Request) -> None:
    text = json.dumps(request_.data())
    assert Request.read(text) == request_
    assert Request.read(json.loads(text)) == request_


def test_the_order_of_methods_is_kept() -> None:
    for names in (["loco", "region-mask"], ["region-mask", "loco"]):
        asked = {"prompt": "a cat", "methods": {name: {} for name in names}}
        assert list(Request.read(json.dumps(Request.read(asked).data())).methods) == names


BASE = {"prompt": "a cat"}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("{", "the request is no JSON"),
        ("[" * 100_000, "the request is no JSON"),
        (None, "the request is None: give names with values"),
        ([], "the request is []"),
        ({}, "there is no prompt"),
        ({"prompt": " "}, "there is no prompt"),
        ({"prompt": 3}, "prompt is 3: give a text"),
        ({"prompt": "a" * 2001}, "prompt has 2001 characters: give at most 2000"),
        (BASE | {"output": "/etc/passwd"}, 'a request has no "output"'),
        (BASE | {"task": "train"}, "task is 'train': choose one of layout, edit, subjects, read, explain, video"),
        (BASE | {"task": ["edit"]}, "choose one of layout"),
        (BASE | {"steps": 0}, "steps is 0: give a whole number from 1 to 200"),
        (BASE | {"steps": 10**9}, "give a whole number from 1 to 200"),
        (BASE | {"steps": 2.5}, "steps is 2.5"),
        (BASE | {"steps": "many"}, "steps is 'many'"),
        (BASE | {"steps": True}, "steps is True"),
        (BASE | {"seed": -1}, "seed is -1"),
        (BASE | {"seed": 2**60}, "seed is"),
        (BASE | {"guidance": float("inf")}, "guidance is inf: give a number from 0 to 100"),
        (BASE | {"guidance": float("nan")}, "guidance is nan"),
        (BASE | {"height": 100_000}, "height is 100000"),
        (BASE | {"width": 65}, "width is 65 pixels: give a multiple of 8"),
        (BASE | {"regions": "{"}, "the regions are no JSON"),
        (BASE | {"regions": {"a": 1}}, "regions: found {'a': 1}, give a list"),
        (BASE | {"regions": [{"phrase": "cat", "box": [0, 0, 1, 1]}] * 33}, "regions: found 33, give at most 32"),
        (BASE | {"regions": [3]}, "region 1 is 3: give a phrase"),
        (BASE | {"regions": [{"phrase": "cat", "mask": "/etc/passwd"}]}, "give a phrase, and a box or a polygon"),
        (BASE | {"regions": [{"phrase": "", "box": [0, 0, 1, 1]}]}, "region 1 has no phrase: click the words"),
        (BASE | {"regions": [{"phrase": "cat"}]}, "needs either a box or a polygon"),
        (BASE | {"regions": [{"phrase": "cat", "box": [0, 0, 1]}]}, "a box is four finite numbers"),
        (BASE | {"regions": [{"phrase": "cat", "box": [0, 0, 2, 1]}]}, "reaches outside 0..1"),
        (BASE | {"regions": [{"phrase": "cat", "box": ["a", 0, 1, 1]}]}, "are no numbers"),
        (BASE | {"regions": [{"phrase": "cat", "polygon": [[0, 0]] * 513}]}, "give at most 512"),
        (BASE | {"regions": [{"phrase": "cat", "polygon": [[0, 0], [1, 1]]}]}, "at least three (x, y) points"),
        (BASE | {"methods": "loco"}, "methods is 'loco'"),
        (BASE | {"methods": {"prompt-to-prompt": {}}}, "belongs to editing, which is not for layout"),
        (BASE | {"methods": {"loco": {"scale": -1}}}, "loco: scale is -1"),
        (BASE | {"phrases": "cat"}, "phrases: found 'cat', give a list"),
        (BASE | {"phrases": [3]}, "the phrase 3 is none"),
        (BASE | {"task": "read", "methods": {"segment": {}}, "prompt": ""}, "there is no prompt"),
        (BASE | {"task": "read", "methods": {"loco": {}}}, "belongs to layout, which is not for read"),
        (
            BASE | {"task": "subjects", "subjects": ["cat"]},
            "the subject 'cat' is none: give phrase, pictures, strength",
        ),
        (BASE | {"task": "subjects", "subjects": [{"phrase": "cat", "image": "/etc/passwd"}]}, "is none"),
        (BASE | {"task": "subjects", "subjects": [{"phrase": "cat", "pictures": 0}]}, "pictures is 0"),
        (BASE | {"task": "subjects", "subjects": [{"phrase": "cat", "strength": -1}]}, "strength is -1"),
        (BASE | {"task": "subjects", "subjects": [{"phrase": "cat"}] * 9}, "subjects: found 9, give at most 8"),
        (BASE | {"task": "edit", "moves": [["cat", 1]]}, "the move ['cat', 1] is none: give phrase, dx, dy"),
        (BASE | {"task": "edit", "moves": [{"phrase": "cat", "dx": 2}]}, "dx is 2: give a number from -1 to 1"),
        (BASE | {"task": "edit", "moves": [{"phrase": "cat", "resize": 0}]}, "resize is 0"),
        (BASE | {"task": "edit", "moves": [{"phrase": "cat", "remove": "yes"}]}, "remove is 'yes'"),
        (BASE | {"task": "edit", "edits": [["cat"]]}, "the edit ['cat'] is none"),
    ],
)
def test_bad_requests_are_refused_with_a_sentence(given: Any, sentence: str) -> None:
    with pytest.raises(ControlError) as caught:
        Request.read(given)
    assert sentence in str(caught.value)


def test_an_empty_canvas_has_no_regions() -> None:
    assert read_places("") == read_places("[]") == ()


def test_regions_that_are_read_need_no_phrase() -> None:
    given = [{"phrase": "", "box": [0, 0, 1, 1]}, {"phrase": "leg", "box": [0, 0, 1, 1]}]
    assert [place.phrase for place in read_places(given, named=False)] == ["part 1", "leg"]
    asked = Request.read({"task": "read", "methods": {"correspond": {}}, "regions": given})
    assert asked.prompt == ""
    assert Request.read(asked.data()) == asked
