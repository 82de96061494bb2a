"""Focus on Your Instruction and LIME: their formulas by hand, and runs on a tiny InstructPix2Pix."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import attnctrl as ac
from attnctrl.controls.editing.focus_on_instruction import FocusOnInstruction, binary, mixed, sharpened
from attnctrl.controls.editing.found import given, on_grid, share
from attnctrl.controls.editing.lime import Lime, effective, k_means, region_of, relevant
from attnctrl.prompt import Reader
from tests import tiny
from tests.methods import SITES, sampling
from tests.probes import Guide, Nudge, Probs

CROSS = ac.Where(kinds=("cross",))
THREE = ("cond", "image", "uncond")
LEFT = torch.zeros(32, 32)
LEFT[:, :16] = 1
WHOLE, NONE = torch.ones(32, 32), torch.zeros(32, 32)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.instruct()


@pytest.fixture(scope="module")
def stock(pipe: Any) -> torch.Tensor:
    return tiny.instructed(pipe)


def draw(pipe: Any, *controls: ac.Control, **kwargs: Any) -> torch.Tensor:
    with ac.control(pipe, *controls, record=False):
        return tiny.instructed(pipe, **kwargs)


# formulas ----------------------------------------------------------------------------------------------------
def test_maps_are_squared_before_they_are_normalised() -> None:
    maps = torch.tensor([[[0.5, 0.25, 0.25, 0.0]]])
    one, half = 0.57611688 + 0.21194156, 0.21194156
    squares = torch.tensor([[0.25, 0.0625], [0.0625, 0.0]])
    weights = torch.tensor([[one, half], [half, one]])
    smooth = (weights @ squares @ weights.T).flatten()
    expected = (smooth - smooth.min()) / (smooth.max() - smooth.min())
    found = sharpened(maps, (1, 2, 2))[0, 0]
    # A grid of two has its neighbour on both sides when reflected.
    reflect = torch.tensor([[0.57611688, 2 * half], [2 * half, 0.57611688]])
    smooth = (reflect @ squares @ reflect.T).flatten()
    expected = (smooth - smooth.min()) / (smooth.max() - smooth.min())
    torch.testing.assert_close(found, expected)
    assert not sharpened(torch.full((1, 1, 4), 0.3), (1, 2, 2)).any()


def test_masks_are_cut_and_grown() -> None:
    maps = torch.zeros(1, 1, 5, 5)
    maps[..., 2, 1] = 0.6
    assert binary(maps, 0.5, 0).nonzero()[:, 2:].tolist() == [[2, 1]]
    grown = binary(maps, 0.5, 1)
    assert int(grown.sum()) == 9
    assert grown[0, 0, 1:4, 0:3].all()
    assert not binary(maps, 0.6, 1).any()


def test_predictions_are_mixed_by_their_masks() -> None:
    one, two, rest = (torch.full((1, 2, 1, 4), value) for value in (1.0, 3.0, 9.0))
    masks = torch.tensor([[[[1, 1, 0, 0]], [[0, 1, 1, 0]]]]).bool()
    assert mixed([one, two], masks, rest)[0, 0, 0].tolist() == [1.0, 2.0, 3.0, 9.0]


def test_masks_on_coarser_grids() -> None:
    masks = torch.zeros(1, 1, 4, 4)
    masks[..., 3, 3] = 1
    assert on_grid(masks, (1, 2, 2)).tolist() == [[[False, False, False, True]]]
    assert on_grid(masks, (1, 4, 4)).sum() == 1
    made = sampling(grid=(2, 2))
    assert share(SITES[1], (1, 2, 2)) == 1
    assert given([LEFT], made)[0, 0].tolist() == [[True, False], [True, False]]


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
    places = {
        word: tokens.occurrences(word)[0] for word in ("turn", "the", "cat", ",", "a", "red", "dog") if word != ","
    }
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


# Focus on Your Instruction -----------------------------------------------------------------------------------
def test_a_mask_of_everything_is_the_stock_guidance(pipe: Any, stock: torch.Tensor) -> None:
    focus = FocusOnInstruction(["cat"], masks=[WHOLE], modulate=False)
    torch.testing.assert_close(draw(pipe, focus), stock, atol=1e-6, rtol=1e-6)
    both = FocusOnInstruction(["cat"], masks=[WHOLE], strength=0.0)
    torch.testing.assert_close(draw(pipe, both), stock, atol=1e-4, rtol=1e-4)


def test_a_mask_of_nothing_leaves_guidance_by_the_picture() -> None:
    pipe, found = tiny.instruct(), Guide()
    focus = FocusOnInstruction(["cat"], masks=[LEFT], modulate=False)
    first = Guide()
    with ac.control(pipe, first, focus, found, record=False):
        tiny.instructed(pipe, steps=1)
    one, combined = first.got[0], found.got[0].combined
    bare = one.uncond + 1.5 * (one.image - one.uncond)
    torch.testing.assert_close(combined[..., 8:], bare[..., 8:], atol=1e-4, rtol=1e-4)
    assert torch.equal(combined[..., :8], one.combined[..., :8])
    assert not torch.allclose(combined[..., 8:], one.combined[..., 8:], atol=1e-3)


def test_instructions_with_predictions_of_their_own_do_not_mix() -> None:
    """What the second instruction says does not change the guidance inside the first one's mask."""
    pipe, predictions = tiny.instruct(), []
    for other in ("a dog", "a bird"):
        last = Guide()
        focus = FocusOnInstruction(
            ["cat", other.split()[1]],
            ["the red cat", other],
            masks=[LEFT, 1 - LEFT],
            modulate=False,
            separate=True,
        )
        with ac.control(pipe, focus, last, record=False):
            tiny.instructed(pipe, f"the red cat and {other}", steps=1)
        predictions.append(last.got[0].combined)
    torch.testing.assert_close(predictions[0][..., :8], predictions[1][..., :8], atol=1e-3, rtol=1e-3)
    assert not torch.allclose(predictions[0][..., 8:], predictions[1][..., 8:], atol=1e-2)


def test_outside_of_all_masks_no_text_is_seen(pipe: Any) -> None:
    """Cross-attention alone: the right half gets what the empty prompt would give it, whatever the prompt is."""
    seen: list[list[torch.Tensor]] = []
    for prompt in ("a cat", "a red bird"):
        outputs: list[torch.Tensor] = []

        def keep(output: torch.Tensor, into: list[torch.Tensor] = outputs) -> torch.Tensor:
            into.append(output)
            return output

        from tests.probes import Output

        first = ac.Where(kinds=("cross",), blocks=("down",))
        focus = FocusOnInstruction([prompt.split()[-1]], masks=[LEFT], disentangle=False, where=first)
        with ac.control(pipe, focus, Output(edit=keep, where=first), record=False):
            tiny.instructed(pipe, prompt, steps=1)
        seen.append(outputs)
    ours, others = (outputs[0].unflatten(2, (16, 16)) for outputs in seen)
    torch.testing.assert_close(ours[..., 8:, :], others[..., 8:, :], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours[..., :8, :], others[..., :8, :], atol=1e-4)


def test_words_of_an_instruction_gain_inside_its_mask_and_lose_in_the_others(pipe: Any) -> None:
    found = []
    for strength in (0.0, 1.0):
        kept: list[torch.Tensor] = []
        focus = FocusOnInstruction(
            ["cat", "dog"], ["a cat", "a dog"], masks=[LEFT, 1 - LEFT], strength=strength, power=0.0, disentangle=False
        )
        probe = Probs(edit=lambda probs, into=kept: (into.append(probs), probs)[1], where=CROSS)  # type: ignore[misc]
        with ac.control(pipe, focus, probe, record=False) as run:
            tiny.instructed(pipe, "a cat and a dog", steps=1)
        cat = run.sampling.find("cat")[0]  # type: ignore[union-attr]
        found.append(kept[0][..., cat].mean(dim=1).reshape(16, 16))
    assert (found[1][:, :8] > found[0][:, :8]).all()
    assert (found[1][:, 8:] < found[0][:, 8:]).all()


def test_masks_are_found_once_their_time_has_come(pipe: Any) -> None:
    focus = FocusOnInstruction(["cat"], read_until=0.5, threshold=0.6)
    with ac.control(pipe, focus, record=False) as run:
        tiny.instructed(pipe, steps=4)
    state = run.sampling.active[0].state  # type: ignore[union-attr]
    assert state.masks.shape == (1, 1, 16, 16)
    assert state.masks.any()
    assert not state.masks.all()
    assert not state.maps
    stock, seen = Guide(), Guide()
    with ac.control(pipe, stock, focus, seen, record=False):
        tiny.instructed(pipe, steps=4)
    changed = [not torch.equal(a.combined, b.combined) for a, b in zip(stock.got, seen.got, strict=True)]
    assert changed == [False, False, True, True]


def test_focus_refuses_what_it_cannot_read(pipe: Any) -> None:
    with pytest.raises(ac.ControlError, match=r"2 phrases and 0 instructions: give for each"):
        draw(pipe, FocusOnInstruction(["cat", "dog"]), steps=1)
    with pytest.raises(ac.ControlError, match=r"1 masks for 2 phrases"):
        draw(pipe, FocusOnInstruction(["cat", "dog"], ["a cat", "a dog"], masks=[LEFT]), steps=1)
    with pytest.raises(ac.ControlError, match=r'"bird" is not in the prompt'):
        draw(pipe, FocusOnInstruction(["bird"]), steps=1)
    with pytest.raises(ac.ControlError, match=r"raise guidance_scale above 1"):
        draw(pipe, FocusOnInstruction(["cat"]), steps=1, guidance_scale=1.0)
    assert torch.isfinite(draw(pipe, FocusOnInstruction(["cat"], disentangle=False), steps=2, guidance_scale=1.0)).all()


# LIME --------------------------------------------------------------------------------------------------------
def test_an_empty_region_changes_nothing(pipe: Any, stock: torch.Tensor) -> None:
    mask = NONE.clone()
    mask[0, 0] = 1  # regions of no pixel at all are refused; one pixel's window is closed before it acts
    with pytest.raises(ac.ControlError):
        draw(pipe, Lime(region=NONE))
    assert torch.equal(draw(pipe, Lime(region=mask, window=ac.Window(0.0, 0.0))), stock)


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


def test_coarse_layers_are_left_alone(pipe: Any) -> None:
    kept: dict[int, float] = {}

    class Keep(Probs):
        def probs(self, probs: torch.Tensor, call: Any, state: Any) -> torch.Tensor:
            kept[call.queries.grid[1]] = float(probs[..., 0].min())
            return probs

    with ac.control(pipe, Lime(region=WHOLE), Keep(where=CROSS), record=False):
        pipe_small = {"steps": 1}
        tiny.instructed(pipe, **pipe_small)
    assert kept == {16: 0.0, 8: 0.0}  # a quarter of the tokens is more than a sixteenth
    assert math.isclose(share(SITES[0], (1, 4, 4)), 1.0)


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


@pytest.mark.parametrize("control", [FocusOnInstruction(["cat"]), Lime()], ids=["focus", "lime"])
def test_they_compose_with_another(pipe: Any, control: ac.Control) -> None:
    alone, nudged, other = (
        draw(pipe, control, steps=4),
        draw(pipe, control, Nudge(), steps=4),
        draw(pipe, Nudge(), steps=4),
    )
    assert torch.isfinite(nudged).all()
    assert not torch.allclose(nudged, alone, atol=1e-3)
    assert not torch.allclose(nudged, other, atol=1e-4)
