"""LIME: its formulas by hand, and runs on a tiny InstructPix2Pix."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import attnctrl as ac
from attnctrl.controls.editing.lime import Lime, State, effective, k_means, region_of, relevant
from attnctrl.prompt import Reader
from attnctrl.sites import TokenLayout
from tests import tiny
from tests.editing import material
from tests.methods import SITES
from tests.probes import Nudge, Probs

CROSS = ac.Where(kinds=("cross",))
THREE = ("cond", "image", "uncond")
LEFT = torch.zeros(32, 32)
LEFT[:, :16] = 1
WHOLE = torch.ones(32, 32)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.instruct()


@pytest.fixture(scope="module")
def stock(pipe: Any) -> torch.Tensor:
    return tiny.instructed(pipe)


def draw(pipe: Any, *controls: ac.Control, **kwargs: Any) -> torch.Tensor:
    with ac.control(pipe, *controls, record=False):
        return tiny.instructed(pipe, **kwargs)


def test_clusters_of_two_constant_halves() -> None:
    features = torch.tensor([[1.0, 0.0]] * 8 + [[0.0, 1.0]] * 8)
    labels = k_means(features, 2)
    assert len(set(labels[:8].tolist())) == len(set(labels[8:].tolist())) == 1
    assert labels[0] != labels[8]
    assert len(k_means(features, 8).unique()) == 2  # there are no more different points
    peak = torch.zeros(16)
    peak[3] = 1
    # The second half's length says nothing: features are compared by direction.
    longer = features * torch.linspace(1, 9, 16)[:, None]
    assert region_of(longer, peak, 2, 1).tolist() == [True] * 8 + [False] * 8
    peak[12] = 0.5
    assert region_of(longer, peak, 2, 2).all()


def test_clusters_are_lloyds() -> None:
    points = torch.randn(60, 3, generator=torch.Generator().manual_seed(1))
    labels = k_means(points, 4)
    assert torch.equal(labels, k_means(points, 4))
    centres = torch.stack([points[labels == i].mean(dim=0) for i in range(4)])
    assert torch.equal(torch.cdist(points, centres).argmin(dim=1), labels)


def test_words_that_say_where() -> None:
    tokens = Reader(tiny.tokenizer()).read("turn the cat, a red dog")
    places = {word: tokens.occurrences(word)[0] for word in ("turn", "the", "cat", "a", "red", "dog")}
    visible, shows = set(effective(tokens)), set(relevant(tokens))
    for word in ("cat", "red", "dog"):
        assert set(places[word]) <= visible
        assert set(places[word]) <= shows
    assert set(places["turn"]) <= visible
    assert not set(places["turn"]) & shows
    for word in ("the", "a"):
        assert not set(places[word]) & (visible | shows)
    assert tokens.end in visible
    assert tokens.end not in shows
    assert 0 not in visible | shows
    assert max(visible) == tokens.end
    longer = Reader(tiny.tokenizer()).read("cat dog " * 20)
    assert effective(longer) == list(range(1, 24))  # 22 words and the end of a window of 24
    assert relevant(longer) == list(range(1, 23))


def test_an_empty_region_changes_nothing(pipe: Any, stock: torch.Tensor) -> None:
    with pytest.raises(ac.ControlError, match="all zero"):
        draw(pipe, Lime(region=torch.zeros(32, 32)))
    lime = Lime(region=WHOLE)
    state = State((1, 16, 16), SEEN, SEEN, region=torch.zeros(1, 1, 16, 16).bool())
    mask = lime.mask(material.call("cross"), replace(state, latents=(1, 2, 2)))
    assert mask is not None
    assert mask.all()
    assert torch.equal(draw(pipe, Lime(region=WHOLE, window=ac.Window(0.0, 0.0))), stock)


def test_inside_the_region_only_words_that_say_something_are_seen(pipe: Any) -> None:
    kept: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}

    class Keep(Probs):
        def probs(self, probs: torch.Tensor, call: Any, state: Any) -> torch.Tensor:
            kept[call.branch, call.queries.grid] = probs
            return probs

    with ac.control(pipe, Lime(region=LEFT), Keep(where=CROSS, branches=THREE), record=False) as run:
        tiny.instructed(pipe, steps=1)
    state = run.sampling.active[0].state  # type: ignore[union-attr]
    seen = state.effective[0]
    assert int(seen.sum()) == 3  # cat, dog and the end
    assert {branch for branch, _ in kept} == set(THREE)
    for (_, grid), probs in kept.items():
        rows = probs.unflatten(2, grid[1:])
        half = grid[2] // 2
        torch.testing.assert_close(rows[..., :half, :][..., seen].sum(dim=-1), torch.ones(rows[..., :half, 0].shape))
        assert float(rows[..., :half, :][..., ~seen].max()) == 0
        assert float(rows[..., half:, :][..., ~seen].min()) > 0


SEEN = torch.arange(24)[None] == 3


def test_coarse_layers_are_left_alone(pipe: Any) -> None:
    kept: dict[int, float] = {}

    class Keep(Probs):
        def probs(self, probs: torch.Tensor, call: Any, state: Any) -> torch.Tensor:
            kept[call.queries.grid[1]] = float(probs[..., 0].min())
            return probs

    with ac.control(pipe, Lime(region=WHOLE), Keep(where=CROSS), record=False):
        tiny.instructed(pipe, steps=1)
    assert kept == {16: 0.0, 8: 0.0}  # a quarter of the tokens is more than a sixteenth
    coarse = replace(SITES[1], depth=2)
    call = material.call("cross").change(site=coarse, queries=TokenLayout.of_latents((1, 1, 1)))
    lime, state = Lime(region=WHOLE), State((1, 4, 4), SEEN, SEEN, region=torch.ones(1, 1, 4, 4).bool())
    assert lime.mask(call, state) is None
    mask = lime.mask(call.change(site=replace(coarse, depth=1), queries=TokenLayout.of_latents((1, 2, 2))), state)
    assert mask is not None
    assert mask.shape == (1, 1, 4, 24)
    assert mask[..., 3].all()
    assert not mask[..., 0].any()


def test_lime_finds_a_region_and_uses_it_afterwards(pipe: Any) -> None:
    lime = Lime(find_at=0.5, window=ac.Window(0.0, 1.0), clusters=3)
    with ac.control(pipe, lime, record=False) as run:
        drawn = tiny.instructed(pipe, steps=4)
    assert run.sampling is not None
    region = run.sampling.active[0].state.region
    assert region.shape == (1, 1, 16, 16)
    assert region.any()
    assert not region.all()
    steps = {row.point: row.steps for row in run.report.rows.values()}
    assert steps["inputs"] >= {1}
    assert 0 not in steps["mask"]
    again = draw(pipe, lime, steps=4)
    assert torch.equal(again, drawn)
    assert not torch.allclose(drawn, tiny.instructed(pipe, steps=4), atol=1e-4)


def test_lime_refuses_what_it_cannot_read(pipe: Any) -> None:
    with pytest.raises(ac.ControlError, match=r'finds no word that says where in "the a"'):
        draw(pipe, Lime(), prompt="the a", steps=1)
    with pytest.raises(ac.ControlError, match=r"reads the region before 0.35 of the run"):
        draw(pipe, Lime(window=ac.Window(0.5, 0.9)), steps=1)
    with pytest.raises(ac.ControlError, match=r"raise read_share"):
        draw(pipe, Lime(read_share=0.01), steps=1)
    with pytest.raises(ac.ControlError, match=r'"bird" is not in the prompt'):
        draw(pipe, Lime(["bird"]), steps=1)


def test_it_composes_with_another(pipe: Any) -> None:
    control = Lime()
    alone, nudged, other = (
        draw(pipe, control, steps=4),
        draw(pipe, control, Nudge(), steps=4),
        draw(pipe, Nudge(), steps=4),
    )
    assert torch.isfinite(nudged).all()
    assert not torch.allclose(nudged, alone, atol=1e-3)
    assert not torch.allclose(nudged, other, atol=1e-4)
