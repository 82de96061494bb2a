"""attnctrl explain: the page is whole in itself and says what the run did."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from attnctrl.cli import main
from attnctrl.commands.explain import words
from attnctrl.explain import _spaced
from tests import tiny

BOXES = ["--region", "a cat@0.0,0.0,0.5,1.0", "--region", "a dog@0.5,0.0,1.0,1.0"]
VOID = {"meta", "img", "br", "rect", "circle", "polyline"}


class Page(HTMLParser):
    """The elements of a page with their attributes, its text, and whether every element was closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def images(self) -> dict[str, Image.Image]:
        """By their descriptions."""
        head = "data:image/png;base64,"
        shown = [a for tag, a in self.found if tag == "img"]
        assert all(str(a["src"]).startswith(head) for a in shown)
        return {
            str(a["alt"]): Image.open(io.BytesIO(base64.b64decode(str(a["src"]).removeprefix(head)))) for a in shown
        }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    tiny.sd().save_pretrained(path)
    return str(path)


def run(model: str, out: Path, *more: str, prompt: str = tiny.PROMPT) -> int:
    size = ["--steps", "3", "--height", "32", "--width", "32", "--device", "cpu"]
    return main(["explain", "--prompt", prompt, "--model", model, *size, "--out", str(out), *more])


def test_the_page_is_whole_and_shows_the_run(model: str, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "new" / "page.html"
    assert run(model, out, *BOXES, "--set", "iterations=2") == 0
    text = out.read_text(encoding="utf-8")
    read = Page(text)
    assert read.open == []
    # Nothing from outside: no link, script or address, whatever the attribute.
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in read.found}
    assert not re.search(r"https?:|//\w|url\(|@import|srcset", re.sub(r"base64,[^\"]*", "", text))
    assert all(str(v).startswith("data:") for _, a in read.found for k, v in a.items() if k in ("src", "href"))
    images = read.images()
    assert images["picture"].size == (32, 32)
    assert "regions" in images
    for word in ("a", "cat", "and", "dog"):
        assert images[f"{word}, all steps"].size == (32, 32)
        assert [images[f"{word}, step {s}"].size for s in range(3)] == [(8, 8)] * 3
    words_shown = " ".join(read.texts)
    assert all(part in words_shown for part in (tiny.PROMPT, "LoCo", "loss", "evaluations", "Losses by step"))
    points = next(a["points"] for tag, a in read.found if tag == "polyline")
    assert len(str(points).split()) > 1
    assert any(tag == "code" for tag, _ in read.found) or "layers" in words_shown
    assert str(out) in capsys.readouterr().out


def test_without_regions_it_is_the_stock_run(model: str, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert run(model, out, "--phrase", "cat", prompt='a cat and a "<b>dog</b>"') == 0
    read = Page(out.read_text(encoding="utf-8"))
    assert read.open == []
    assert "b" not in {tag for tag, _ in read.found}  # what users write is text
    assert {alt for alt in read.images() if alt.startswith("dog")} == set()
    assert "No control acted" in " ".join(read.texts)


def test_bad_input_is_a_sentence(model: str, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "page.html"
    assert run(model, out, "--method", "loco") == 2
    assert "acts on regions: give a --region" in capsys.readouterr().err
    assert run(model, out, "--phrase", "bird") == 2
    assert '"bird" is not in the prompt' in capsys.readouterr().err
    out.write_text("precious")
    assert run(model, out) == 2
    assert "pass --force" in capsys.readouterr().err


def test_words_and_steps() -> None:
    assert words("A red-hot cat, and a dog's red-hot bowl") == ["a", "red-hot", "cat", "and", "dog's", "bowl"]
    assert _spaced(3, 12) == [0, 1, 2]
    assert _spaced(25, 4) == [0, 8, 16, 24]
