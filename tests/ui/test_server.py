"""The page's endpoints over HTTP: what programs get, and that hostile input gets a sentence and nothing else."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import httpx
import pytest
from gradio_client import Client, handle_file
from PIL import Image

from attnctrl.ui.desk import Desk
from attnctrl.ui.request import Request
from tests.ui.parts import LAYOUT, backend, drawn, same
from tests.ui.test_files import bomb

BOX = {"phrase": "a red circle", "box": [0, 0, 0.5, 0.5]}
HOSTILE: list[Any] = [
    None,
    3,
    "text",
    "[" * 5000,
    [],
    {},
    {"prompt": None},
    {"prompt": ["a"] * 100},
    {"prompt": "a" * 100_000},
    {"prompt": "a", "task": "../edit", "model": "hub/other"},
    *({**LAYOUT, **change} for change in (
        {"prompt": "   "},
        {"steps": -1}, {"steps": 10**12}, {"steps": "25"}, {"steps": None}, {"steps": [25]}, {"steps": 1e308},
        {"seed": -5}, {"seed": 1e30}, {"seed": {"a": 1}},
        {"guidance": -1}, {"guidance": 1e9}, {"guidance": "high"},
        {"height": 1}, {"height": 10**9}, {"width": 100.5}, {"width": "wide"},
        {"regions": "all"}, {"regions": [None]}, {"regions": [[]]}, {"regions": [BOX] * 1000},
        {"regions": [{"phrase": "a cat", "box": [0, 0, 1, 1]}]},
        {"regions": [{"phrase": "<script>alert(1)</script>", "box": [0, 0, 1, 1]}]},
        {"regions": [{**BOX, "box": [0.5, 0, 0.1, 1]}]},
        {"regions": [{**BOX, "box": [0, 0, 1e-9, 1e-9]}]},
        {"regions": [{**BOX, "box": "0,0,1,1"}]},
        {"regions": [{**BOX, "mask": "/etc/passwd"}]},
        {"regions": [{"phrase": "a red circle", "polygon": [[0, 0], [0, 0], [9, 9]]}]},
        {"methods": ["loco"]}, {"methods": {"os.system": {}}}, {"methods": {"__class__": {}}},
        {"methods": {"loco": {"scale": 1e9}}}, {"methods": {"loco": {"where": "everywhere"}}},
        {"methods": {"loco": {"window_start": 1, "window_end": 0}}},
        {"methods": {"planned": {"plan": "/etc/passwd"}}}, {"methods": {"paro": {"plan": "../../secret"}}},
        {"methods": {"soft-pag": {"heads": "/etc/passwd"}}}, {"methods": {"soft-pag": {"heads": {"a": 1}}}},
        {"phrases": ["a cat"]}, {"phrases": ["x"] * 1000}, {"image": "/etc/passwd"},
    )),
]  # fmt: skip


@pytest.fixture(scope="module")
def client(address: str) -> Client:
    return Client(address, verbose=False)


def refusal(call: Any) -> str:
    """The sentence with which a call is refused."""
    with pytest.raises(Exception, match=r"\w+ \w+") as caught:
        call()
    return str(caught.value)


def serves(client: Client) -> bool:
    return client.predict({"prompt": "a red circle"}, api_name="/check")["words"] == ["a", "red", "circle"]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_requests_are_refused_with_a_sentence(client: Client, number: int) -> None:
    assert len(HOSTILE) >= 50
    text = refusal(lambda: client.predict(HOSTILE[number], api_name="/layout"))
    assert "Traceback" not in text
    assert "the run failed" not in text, "it was not foreseen"
    assert "upstream Gradio app has raised" not in text, "it says nothing"
    assert serves(client)


def test_hostile_files_are_refused_with_a_sentence(client: Client, tmp_path: Path) -> None:
    asked = {"prompt": "a red circle", "edits": [["red", "green"]], "steps": 2}
    text, cut = tmp_path / "script.png", tmp_path / "cut.png"
    text.write_text("<script>alert(1)</script>")
    Image.effect_noise((64, 64), 9).save(cut)
    cut.write_bytes(cut.read_bytes()[:500])
    empty = tmp_path / "empty.png"
    empty.write_bytes(b"")
    for path, sentence in (
        (text, "is no picture that can be read"),
        (cut, "cannot be decoded"),
        (empty, "is no picture that can be read"),
        (bomb(tmp_path / "large.png", 9000), "the picture is 9000x9000 pixels"),
        (bomb(tmp_path / "bomb.png", 60_000), "is no picture that can be read"),
    ):
        assert sentence in refusal(lambda path=path: client.predict(asked, handle_file(path), api_name="/edit"))
    assert "there is no picture" in refusal(lambda: client.predict(asked, None, api_name="/edit"))
    assert serves(client)


def test_hostile_subjects_and_readings_are_refused_with_a_sentence(client: Client, tmp_path: Path) -> None:
    good, text = tmp_path / "good.png", tmp_path / "text.png"
    Image.new("RGB", (64, 64), "red").save(good)
    text.write_text("<script>alert(1)</script>")
    cat = {"prompt": "a cat", "subjects": [{"phrase": "a cat"}], "methods": {"magic-face": {}}, "steps": 2}
    many = {**cat, "subjects": [{"phrase": "a cat", "pictures": 8}]}
    read = {"prompt": "a cat", "methods": {"segment": {}}, "steps": 2}
    for endpoint, asked, paths, sentence in (
        ("/subjects", {**cat, "subjects": []}, [good], "there are no subjects"),
        ("/subjects", {**cat, "subjects": [{"phrase": "a cat", "image": "/etc/passwd"}]}, [good], "is none"),
        ("/subjects", {**cat, "subjects": [{"phrase": "a cat", "strength": 1e9}]}, [good], "strength is"),
        ("/subjects", {**cat, "noise": "/etc/passwd"}, [good], "reference_noise is"),
        ("/subjects", {**cat, "words": "guessed"}, [good], "words are"),
        ("/subjects", cat, [], "the subjects have 1 pictures, and 0 are given"),
        ("/subjects", cat, [text], "is no picture that can be read"),
        ("/subjects", cat, [bomb(tmp_path / "bomb.png", 60_000)], "is no picture that can be read"),
        ("/subjects", many, [good] * 9, "there are 9 pictures: give at most 8"),
        ("/read", read, [], "segment takes 1 picture, and 0 are given"),
        ("/read", {**read, "methods": {"correspond": {"point": [9, 9]}}}, [good, good], 'has no parameter "point"'),
        ("/read", {**read, "methods": {"segment": {}, "correspond": {}}}, [good], "reading takes one method"),
        ("/read", read, [bomb(tmp_path / "wide.png", 4000)], "cannot be decoded"),
    ):
        files = [handle_file(path) for path in paths]
        text_of = refusal(lambda e=endpoint, a=asked, f=files: client.predict(a, f, api_name=e))
        assert sentence in text_of, (endpoint, asked)
    assert serves(client)


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../../../etc/passwd", "file:///etc/passwd", "/proc/self/environ", "attnctrl/cli.py", "~/.ssh"],
)
def test_no_path_of_the_servers_is_read(address: str, client: Client, path: str) -> None:
    """As a program would send it, without an upload."""
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    data = [{"prompt": "a red circle", "edits": [["red", "green"]], "steps": 2}, file]
    called = httpx.post(f"{address}/gradio_api/call/edit", json={"data": data}, timeout=60)
    event = called.json().get("event_id")
    heard = httpx.get(f"{address}/gradio_api/call/edit/{event}", timeout=60).text if event else called.text
    assert "event: complete" not in heard
    assert "root:" not in heard
    assert httpx.get(f"{address}/gradio_api/file={path}", timeout=60).status_code in (403, 404)
    assert serves(client)


def test_uploads_have_a_limit(address: str, client: Client) -> None:
    files = {"files": ("big.png", b"\0" * (17 * 2**20))}
    assert httpx.post(f"{address}/gradio_api/upload", files=files, timeout=60).status_code == 413
    assert serves(client)


def test_it_listens_to_this_machine_alone_and_keeps_to_itself(address: str) -> None:
    assert urlparse(address).hostname == "127.0.0.1"
    assert httpx.get(f"{address}/monitoring", timeout=60).status_code in (403, 404)
    config = httpx.get(f"{address}/config", timeout=60).json()
    assert config["analytics_enabled"] is False


def test_endpoints_have_names(client: Client) -> None:
    named = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert [*named] == ["/layout", "/edit", "/subjects", "/read", "/explain", "/video", "/check", "/methods", "/stop"]


def test_the_forms_are_told(client: Client) -> None:
    told = {one["name"]: one for one in client.predict(api_name="/methods")}
    scale = next(f for f in told["loco"]["fields"] if f["name"] == "scale")
    assert (scale["kind"], scale["low"], scale["high"], scale["default"]) == ("number", 0, 1000, 30.0)
    assert json.dumps(told)


def test_check_says_what_is_wrong_at_once(client: Client) -> None:
    told = client.predict(
        {"prompt": "a red circle", "regions": [{"phrase": "cat", "box": [0, 0, 1, 1]}]}, api_name="/check"
    )
    assert 'the phrase "cat" is not in the prompt' in told["problem"]


def test_clips_are_drawn_and_hostile_ones_refused_with_a_sentence(client: Client) -> None:
    asked = {"prompt": "a red circle moving left", "methods": {"radial": {"window_start": 0}}, "seed": 3, "steps": 1}
    stock, controlled, strips, told = client.predict(asked, api_name="/video")
    for path in (stock, controlled):
        with Image.open(path) as clip:
            assert (clip.format, clip.n_frames, clip.size) == ("WEBP", 9, (128, 128))
    assert [one["caption"] for one in strips] == ["stock", "controlled"]
    assert "of the pairs" in told["report"]
    assert told["request"] == Request.read({**asked, "task": "video"}).data()
    for change, sentence in (
        ({"methods": {"prompt-to-prompt": {}}}, "belongs to editing, which is not for video"),
        ({"methods": {"planned": {"plan": "/etc/passwd"}}}, "there is no file"),
        ({"methods": {"radial": {"decay": 1e9}}}, "radial: decay is"),
        ({"methods": {"region-mask": {}}}, "region-mask places objects in regions: draw at least one"),
        ({"regions": [{"phrase": "a cat", "box": [0, 0, 1, 1]}], "methods": {"loco": {}}}, "is not in the prompt"),
        ({"steps": 10**9}, "steps is"),
        ({"prompt": None}, "prompt is None"),
        ({"num_frames": 10**9}, 'a request has no "num_frames"'),
    ):
        text = refusal(lambda change=change: client.predict({**asked, **change}, api_name="/video"))
        assert sentence in text, change
    told = client.predict({"task": "video", "prompt": "a red circle moving left"}, api_name="/check")
    assert told["words"] == ["a", "red", "circle", "moving", "left"]
    assert serves(client)


def test_two_clients_at_once_get_what_each_gets_alone(address: str) -> None:
    asked = [LAYOUT, {**LAYOUT, "seed": 9, "methods": {"region-mask": {"weight": 0.5}}}]
    alone = [drawn(Desk(backend()), Request.read(one)) for one in asked]
    found: dict[int, Any] = {}

    def visit(number: int) -> None:
        found[number] = Client(address, verbose=False).predict(asked[number], api_name="/layout")

    threads = [threading.Thread(target=visit, args=(i,)) for i in range(2)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(180)
    for number, result in enumerate(alone):
        stock, controlled, maps, told = found[number]
        assert same(Image.open(stock), result.stock)
        assert same(Image.open(controlled), result.controlled)
        assert [one["caption"] for one in maps] == ["a red circle", "a blue square"]
        assert told["request"] == Request.read(asked[number]).data()
        assert "ac.RegionMask" in told["python"]


def test_a_run_is_stopped_over_the_api(client: Client) -> None:
    job = client.submit(
        {**LAYOUT, "steps": 200, "methods": {"layout-guidance": {"iterations": 50}}}, api_name="/layout"
    )
    while not job.outputs():
        assert not job.done()
    assert client.predict(api_name="/stop") == {"stopped": 1}
    assert "Stopped before" in refusal(job.result)
    assert serves(client)
