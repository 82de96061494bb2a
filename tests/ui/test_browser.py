"""A whole visit of the page in headless Chromium: draw, tie, run, compare, download, load, stop.

With ATTNCTRL_SCREENSHOTS=docs the screenshots of the documentation are taken on the way.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
from PIL import Image

from attnctrl.ui.desk import Desk
from attnctrl.ui.examples import CLIPS
from attnctrl.ui.files import request_in
from attnctrl.ui.request import Request
from tests.ui.parts import backend, drawn, same

pytestmark = [pytest.mark.browser, pytest.mark.slow]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SLOW = 240_000  # milliseconds; it is waited for no longer than it takes
PROMPT = "a green star and a yellow heart on a black background"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    with api.sync_playwright() as play:
        yield play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])


class Visit:
    """One visitor's page, which must raise no error and ask no other host for anything."""

    def __init__(self, browser: Any, address: str) -> None:
        self.context = browser.new_context(viewport={"width": 1360, "height": 900}, accept_downloads=True)
        self.page = self.context.new_page()
        self.page.set_default_timeout(SLOW)
        self.errors: list[str] = []
        self.hosts: set[str | None] = set()
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.hosts.add(urlparse(request.url).hostname))
        self.page.goto(address)
        self.page.wait_for_selector("#layout-canvas li")

    def close(self) -> None:
        assert self.errors == []
        assert self.hosts <= {"127.0.0.1", None}
        self.context.close()

    def drag(self, canvas: str, box: tuple[float, float, float, float]) -> None:
        target = self.page.locator(f"{canvas} canvas")
        target.scroll_into_view_if_needed()
        frame = target.bounding_box()
        x0, y0, x1, y1 = (frame["xy"[i % 2]] + v * frame[("width", "height")[i % 2]] for i, v in enumerate(box))
        self.page.mouse.move(x0, y0)
        self.page.mouse.down()
        self.page.mouse.move((x0 + x1) / 2, (y0 + y1) / 2)
        self.page.mouse.move(x1, y1)
        self.page.mouse.up()

    def tie(self, canvas: str, first: int, last: int) -> None:
        """Words number first to last of the prompt to the selected region."""
        for number in (first, last):
            self.page.locator(f"{canvas} .words button").nth(number).click()

    def steps(self, tab: str, value: int) -> None:
        number = self.page.locator(f"#{tab}-steps input[type=number]")
        number.fill(str(value))
        number.press("Tab")
        self.page.wait_for_timeout(300)  # until the slider has handed it on

    def wait(self, tab: str, text: str) -> None:
        self.page.wait_for_function(
            "([id, text]) => document.querySelector(id)?.innerText.includes(text)", arg=[f"#{tab}-status", text]
        )

    def shoot(self, name: str) -> None:
        folder = os.environ.get("ATTNCTRL_SCREENSHOTS")
        if folder:
            path = Path(folder) / f"ui-{name}.png"
            self.page.mouse.move(0, 0)
            self.page.screenshot(path=path, full_page=True)
            Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)

    def download(self, tab: str, path: Path) -> Path:
        self.page.wait_for_selector(f"#{tab}-download:not([disabled])")
        with self.page.expect_download() as waited:
            self.page.locator(f"#{tab}-download").click()
        waited.value.save_as(path)
        return path


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Visit]:
    one = Visit(browser, address)
    yield one
    one.close()


def test_a_whole_visit(visit: Visit, tmp_path: Path) -> None:
    page = visit.page
    page.locator("#layout-canvas [data-act=clear]").click()
    page.locator("#layout-prompt textarea").fill(PROMPT)
    page.wait_for_function("document.querySelectorAll('#layout-canvas .words button').length === 11")

    visit.drag("#layout-canvas", (0.08, 0.5, 0.45, 0.92))
    page.wait_for_function("document.querySelector('#layout-problem').innerText.includes('region 1 has no phrase')")
    visit.tie("#layout-canvas", 0, 2)
    page.wait_for_function("document.querySelector('#layout-problem').innerText.trim() === ''")
    visit.drag("#layout-canvas", (0.55, 0.08, 0.92, 0.5))
    visit.tie("#layout-canvas", 4, 6)
    phrases = page.locator("#layout-canvas input.phrase")
    assert [phrases.nth(i).input_value() for i in range(2)] == ["a green star", "a yellow heart"]
    phrases.nth(1).fill("a purple heart")
    phrases.nth(1).press("Tab")
    page.wait_for_function(
        "document.querySelector('#layout-problem').innerText.includes('\"a purple heart\" is not in the prompt')"
    )
    phrases.nth(1).fill("a yellow heart")
    phrases.nth(1).press("Tab")

    visit.steps("layout", 12)
    page.locator("#layout-run").click()
    visit.wait("layout", "of the controlled picture")
    visit.wait("layout", "Done.")
    page.wait_for_selector("#layout-maps img")
    assert page.locator("#layout-picture0 img").count() == page.locator("#layout-picture1 img").count() == 1
    assert page.locator("#layout-maps .thumbnail-item, #layout-maps button img").count() >= 2
    visit.shoot("layout")

    path = visit.download("layout", tmp_path / "one.png")
    given = request_in(path)
    assert given.pop("model") == "shapes-sd"
    asked = Request.read(given)
    assert asked.prompt == PROMPT
    assert dict(asked.methods) == {"loco": {}}, "the form changed nothing unasked"
    for place, box in zip(asked.regions, ((0.08, 0.5, 0.45, 0.92), (0.55, 0.08, 0.92, 0.5)), strict=True):
        assert place.box == pytest.approx(box, abs=0.01)
    assert same(Image.open(path), drawn(Desk(backend()), asked).controlled)

    page.locator("#layout-canvas [data-act=clear]").click()
    page.locator("#layout-prompt textarea").fill("a red ring")
    with page.expect_file_chooser() as chooser:
        page.locator("#layout-load").click()
    chooser.value.set_files(path)
    visit.wait("layout", "Loaded.")
    page.wait_for_function("document.querySelectorAll('#layout-canvas li').length === 2")
    assert page.locator("#layout-prompt textarea").input_value() == PROMPT
    page.locator("#layout-run").click()
    visit.wait("layout", "Done.")
    again = visit.download("layout", tmp_path / "two.png")
    assert same(Image.open(again), Image.open(path))


def test_a_run_is_stopped_and_a_failed_one_says_why(visit: Visit) -> None:
    page = visit.page
    visit.steps("layout", 200)
    page.locator("#layout-run").click()
    visit.wait("layout", "of 200 of the controlled picture")
    page.locator("#layout-stop").click()
    visit.wait("layout", "Stopped after step")
    page.locator("#layout-canvas [data-act=clear]").click()
    page.locator("#layout-run").click()
    visit.wait("layout", "loco places objects in regions: draw at least one")
    page.wait_for_selector("#layout-run:not([disabled])")


def test_two_visitors_at_once_get_what_each_gets_alone(browser: Any, address: str, tmp_path: Path) -> None:
    visits = [Visit(browser, address) for _ in range(2)]
    for number, visit in enumerate(visits):
        visit.page.locator("#layout-prompt textarea").fill(("a red circle", "a blue square")[number])
        visit.page.locator("#layout-canvas [data-act=clear]").click()
        visit.drag("#layout-canvas", ((0.1, 0.1, 0.5, 0.5), (0.4, 0.4, 0.9, 0.9))[number])
        visit.page.wait_for_function("document.querySelectorAll('#layout-canvas .words button').length === 3")
        visit.tie("#layout-canvas", 0, 2)
        visit.steps("layout", 8)
    for visit in visits:
        visit.page.locator("#layout-run").click()
    for number, visit in enumerate(visits):
        visit.wait("layout", "Done.")
        path = visit.download("layout", tmp_path / f"{number}.png")
        given = request_in(path)
        given.pop("model")
        assert given["prompt"] == ("a red circle", "a blue square")[number]
        assert same(Image.open(path), drawn(Desk(backend()), Request.read(given)).controlled)
        visit.close()


def test_a_picture_is_edited_where_a_region_says(visit: Visit, tmp_path: Path) -> None:
    page = visit.page
    stock = drawn(
        Desk(backend()), Request.read({"prompt": "a red circle and a blue square", "seed": 1, "guidance": 3.5})
    )
    stock.stock.save(tmp_path / "given.png")
    page.get_by_role("tab", name="Edit").click()
    page.locator("#edit-file input[type=file]").set_input_files(tmp_path / "given.png")
    page.locator("#edit-prompt textarea").fill("a red circle and a blue square")
    page.wait_for_function("document.querySelectorAll('#edit-canvas .words button').length === 7")
    page.locator("#edit-edits textarea").fill("blue square = yellow heart")
    visit.drag("#edit-canvas", (0.4, 0.02, 0.98, 0.98))
    visit.tie("#edit-canvas", 5, 6)
    visit.steps("edit", 12)
    page.locator("#edit-run").click()
    visit.wait("edit", "Done.")
    page.wait_for_selector("#edit-picture1 img")
    edited = Image.open(visit.download("edit", tmp_path / "edited.png"))
    assert edited.size == stock.stock.size
    assert not same(edited, stock.stock)


def test_the_example_of_an_edit_fills_its_tab(visit: Visit) -> None:
    page = visit.page
    page.get_by_role("tab", name="Edit").click()
    page.locator("#edit-example").click()
    page.wait_for_function("document.querySelectorAll('#edit-canvas li').length === 1")
    assert page.locator("#edit-edits textarea").input_value() == "blue square = yellow heart"
    visit.steps("edit", 12)
    page.locator("#edit-run").click()
    visit.wait("edit", "Done.")
    page.wait_for_selector("#edit-picture1 img")
    visit.shoot("edit")


def test_subjects_of_the_example_are_drawn(visit: Visit, tmp_path: Path) -> None:
    page = visit.page
    page.get_by_role("tab", name="Subjects").click()
    page.locator("#subjects-example").click()
    page.wait_for_function("document.querySelectorAll('#subjects-canvas li').length === 2")
    phrases = [page.locator(f"#subjects-phrase{i} input, #subjects-phrase{i} textarea").first for i in (1, 2)]
    assert [one.input_value() for one in phrases] == ["a circle", "a square"]
    visit.steps("subjects", 16)
    page.locator("#subjects-run").click()
    visit.wait("subjects", "Done.")
    page.wait_for_selector("#subjects-picture1 img")
    visit.shoot("subjects")
    path = visit.download("subjects", tmp_path / "subjects.png")
    given = request_in(path)
    assert given.pop("model") == "shapes-sd"
    asked = Request.read(given)
    assert [(one.phrase, one.pictures) for one in asked.subjects] == [("a circle", 1), ("a square", 1)]
    assert [place.phrase for place in asked.regions] == ["a circle", "a square"]
    assert dict(asked.methods) == {"region-mask": {}, "delayed-subject": {"delay": 0.0}}
    phrases[0].fill("")
    phrases[0].press("Tab")
    page.locator("#subjects-run").click()
    visit.wait("subjects", "subject 1 has no words")


def test_words_are_found_in_a_given_picture(visit: Visit) -> None:
    page = visit.page
    page.get_by_role("tab", name="Read").click()
    page.locator("#read-run").click()
    visit.wait("read", "there is no prompt")
    page.locator("#read-example").click()
    page.wait_for_function("document.querySelectorAll('#read-canvas li').length === 1")
    page.locator("#read-run").click()
    visit.wait("read", "Done.")
    page.wait_for_selector("#read-picture1 img")
    page.wait_for_selector("#read-maps img")
    visit.shoot("read")


def test_words_are_explained(visit: Visit) -> None:
    page = visit.page
    page.get_by_role("tab", name="Explain").click()
    page.locator("#explain-run").click()
    visit.wait("explain", "Done.")
    page.wait_for_selector("#explain-maps img")
    visit.shoot("explain")


def test_a_clip_is_drawn_stopped_downloaded_and_loaded(visit: Visit, tmp_path: Path) -> None:
    page = visit.page
    page.get_by_role("tab", name="Video").click()
    visit.wait("video", "Ready.")
    page.wait_for_function("document.querySelectorAll('#video-canvas .words button').length === 15")
    page.wait_for_function("document.querySelectorAll('#video-canvas li').length === 2")
    page.locator("#video-run").click()
    visit.wait("video", "of the controlled clip")
    page.locator("#video-stop").click()
    visit.wait("video", "Stopped after step")
    page.locator("#video-run").click()
    visit.wait("video", "Done.")
    page.wait_for_selector("#video-maps img")
    for number in (0, 1):
        page.wait_for_selector(f"#video-picture{number} img")
        assert ".webp" in page.locator(f"#video-picture{number} img").get_attribute("src")
    visit.shoot("video")
    path = visit.download("video", tmp_path / "clip.webp")
    with Image.open(path) as clip:
        assert (clip.n_frames, clip.size) == (9, (128, 128))
    given = request_in(path)
    assert given.pop("model") == "shapes-video"
    assert Request.read(given) == next(iter(CLIPS.values())), "the forms changed nothing unasked"
    page.locator("#video-canvas [data-act=clear]").click()
    page.locator("#video-prompt textarea").fill("a red ring")
    with page.expect_file_chooser() as chooser:
        page.locator("#video-load").click()
    chooser.value.set_files(path)
    visit.wait("video", "Loaded.")
    page.wait_for_function("document.querySelectorAll('#video-canvas li').length === 2")
    assert page.locator("#video-prompt textarea").input_value() == given["prompt"]
