"""Focus on Your Instruction: its formulas by hand, and runs on a tiny InstructPix2Pix."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import attnctrl as ac
from attnctrl.controls.editing.focus_on_instruction import FocusOnInstruction, binary, mixed, sharpened
from attnctrl.controls.editing.found import given, on_grid, share
from tests import tiny
from tests.methods import SITES, sampling
from tests.probes import Guide, Nudge, Output, Probs

CROSS = ac.Where(kinds=("cross",))
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


def test_maps_are_squared_before_they_are_normalised() -> None:
    maps = torch.tensor([[[0.5, 0.25, 0.25, 0.0]]])
    squares = torch.tensor([[0.25, 0.0625], [0.0625, 0.0]])
    # Of a grid of two, reflection puts the neighbour on both sides.
    line = torch.tensor([[0.57611688, 2 * 0.21194156], [2 * 0.21194156, 0.57611688]])
    smooth = (line @ squares @ line.T).flatten()
    expected = (smooth - smooth.min()) / (smooth.max() - smooth.min())
    torch.testing.assert_close(sharpened(maps, (1, 2, 2))[0, 0], expected)
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
    assert [share(replace(SITES[1], depth=depth)) for depth in (0, 1, 2)] == [1, 1 / 4, 1 / 16]
    assert given([LEFT], made)[0, 0].tolist() == [[True, False], [True, False]]


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


def test_words_beyond_the_encoders_window_are_left_out(pipe: Any) -> None:
    with ac.control(pipe, FocusOnInstruction(["dog"], masks=[LEFT]), record=False) as run:
        tiny.instructed(pipe, "dog" + " cat" * 30, steps=1)
    assert run.sampling is not None
    assert run.sampling.active[0].state.spans[0, 0].nonzero().flatten().tolist() == list(range(1, 23))


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


def test_it_composes_with_another(pipe: Any) -> None:
    control = FocusOnInstruction(["cat"])
    alone, nudged, other = (
        draw(pipe, control, steps=4),
        draw(pipe, control, Nudge(), steps=4),
        draw(pipe, Nudge(), steps=4),
    )
    assert torch.isfinite(nudged).all()
    assert not torch.allclose(nudged, alone, atol=1e-3)
    assert not torch.allclose(nudged, other, atol=1e-4)
