"""The six points inside attention: each acts, on the right rows, with the right shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import attnctrl as ac
from attnctrl.control import POINTS
from attnctrl.sites import Call, Stream
from tests import tiny
from tests.probes import EVERYWHERE, Attend, Inputs, Mask, Output, Probs, Scores, only_first_key
from tests.spies import COND, UNCOND, attention_layers, watch


def half_streams(call: Call) -> Call:
    """Half of the weight to a second stream of the very same context: nothing may change."""
    half = torch.full_like(call.query[:, :1, :, :1], 0.5)
    return call.change(streams=(Stream(call.key, call.value, half),), base_weight=half)


def foreign_stream(call: Call) -> Call:
    """All weight to a context of zeros."""
    one = torch.ones_like(call.query[:, :1, :, :1])
    zeros = torch.zeros_like(call.value[:, :, :3])
    return call.change(streams=(Stream(zeros, zeros, one),), base_weight=0 * one)


NO_OPS: dict[str, ac.Control] = {
    "inputs": Inputs(where=EVERYWHERE),
    "streams": Inputs(edit=half_streams, where=EVERYWHERE),
    "scores": Scores(where=EVERYWHERE),
    "probs": Probs(where=EVERYWHERE),
    "output": Output(where=EVERYWHERE),
}
ACTS: dict[str, ac.Control] = {
    "inputs": Inputs(edit=lambda call: call.change(query=3 * call.query, value=call.value + 1), where=EVERYWHERE),
    "streams": Inputs(edit=foreign_stream),
    "mask": Mask(make=only_first_key, where=EVERYWHERE),
    "additive mask": Mask(
        make=lambda call: torch.linspace(0, 9, call.key.shape[2]).expand(1, 1, call.query.shape[2], -1)
    ),
    "scores": Scores(edit=lambda s: s + torch.linspace(0, 9, s.shape[-1]), where=EVERYWHERE),
    "probs": Probs(edit=lambda p: p.flip(-1) * 2, where=EVERYWHERE),
    "attend": Attend(where=EVERYWHERE),
    "output": Output(edit=lambda o: o + 1, where=EVERYWHERE),
}


@pytest.mark.parametrize("model", [tiny.sd, tiny.sdxl])
@pytest.mark.parametrize("point", NO_OPS)
def test_a_point_that_returns_what_it_got_changes_nothing(point: str, model: Any) -> None:
    pipe = model()
    expected = tiny.draw(pipe)
    with ac.control(pipe, NO_OPS[point]) as run:
        torch.testing.assert_close(tiny.draw(pipe), expected, atol=1e-4, rtol=1e-4)
    (row,) = run.report.rows.values()
    assert row.sites == set(attention_layers(pipe))


@pytest.mark.parametrize("point", ACTS)
def test_an_attention_point_acts_on_the_conditional_rows_alone(point: str) -> None:
    pipe = tiny.sd()
    stock, seen = watch(pipe, steps=1).predictions[0], watch(pipe, ACTS[point], steps=1).predictions[0]
    torch.testing.assert_close(seen[UNCOND], stock[UNCOND], atol=1e-5, rtol=1e-5)
    assert (seen[COND] - stock[COND]).abs().max() > 1e-3


@pytest.mark.parametrize("point", ACTS)
def test_an_attention_point_acts_on_the_unconditional_rows_when_asked(point: str) -> None:
    pipe = tiny.sd()
    control = type(ACTS[point])(**{**vars(ACTS[point]), "branches": ("uncond",)})
    stock, seen = watch(pipe, steps=1).predictions[0], watch(pipe, control, steps=1).predictions[0]
    torch.testing.assert_close(seen[COND], stock[COND], atol=1e-5, rtol=1e-5)
    assert (seen[UNCOND] - stock[UNCOND]).abs().max() > 1e-3


@pytest.mark.parametrize("point", ACTS)
def test_an_attention_point_acts_without_guidance(point: str) -> None:
    pipe = tiny.sd()
    stock = watch(pipe, steps=1, guidance_scale=1.0).predictions[0]
    seen = watch(pipe, ACTS[point], steps=1, guidance_scale=1.0).predictions[0]
    assert len(seen) == 1
    assert (seen - stock).abs().max() > 1e-3


def test_the_table_covers_every_attention_point() -> None:
    shown = {point for control in ACTS.values() for point in control.points()}
    assert shown == {"inputs", "mask", "scores", "probs", "attend", "output"}
    assert len(POINTS) == 11


def test_shapes_of_scores_and_probabilities() -> None:
    pipe, scores, probs = tiny.sd(), Scores(where=EVERYWHERE), Probs(where=EVERYWHERE)
    with ac.control(pipe, scores, probs):
        tiny.draw(pipe, steps=1, num_images_per_prompt=2)
    assert {kind for kind, *_ in scores.shapes} == {"cross", "self"}
    for kind, shape, dtype, query, key in scores.shapes:
        assert shape == (2, query[1], query[2], key[2])
        assert dtype == torch.float32
        assert key[2] == (24 if kind == "cross" else query[2])
    assert {shape[2] for _, shape, *_ in scores.shapes} == {256, 64}  # 16 x 16 latents, and half of that
    for sums in probs.sums:
        torch.testing.assert_close(sums, torch.ones_like(sums))


def test_a_boolean_mask_hides_what_it_says() -> None:
    probs = Probs()
    pipe = tiny.sd()

    def second_half(call: Call) -> torch.Tensor:
        return (torch.arange(call.key.shape[2]) < 12).expand(1, 1, call.query.shape[2], -1)

    kept: list[torch.Tensor] = []
    keep = Probs(edit=lambda p: (kept.append(p), p)[1])
    with ac.control(pipe, Mask(make=second_half), keep, probs):
        tiny.draw(pipe, steps=1)
    assert all((p[..., 12:] == 0).all() for p in kept)
    assert all((p[..., :12] > 0).all() for p in kept)


def test_two_masks_hide_what_either_hides_and_a_query_without_keys_sees_all() -> None:
    kept: list[torch.Tensor] = []
    keep = Probs(edit=lambda p: (kept.append(p), p)[1])
    pipe = tiny.sd()

    def columns(*visible: int) -> Callable[[Call], torch.Tensor]:
        def make(call: Call) -> torch.Tensor:
            mask = torch.zeros(1, 1, call.query.shape[2], call.key.shape[2], dtype=torch.bool)
            mask[..., visible] = True
            return mask

        return make

    with ac.control(pipe, Mask(make=columns(0, 1)), Mask(make=columns(1, 2)), keep):
        tiny.draw(pipe, steps=1)
    assert all((p[..., 1] == 1).all() for p in kept)
    kept.clear()
    with ac.control(pipe, Mask(make=columns(0)), Mask(make=columns(2)), keep):
        assert torch.isfinite(tiny.draw(pipe, steps=1)).all()
    assert all((p > 0).all() for p in kept)


def test_controls_act_in_the_order_given() -> None:
    pipe, order = tiny.sd(), []

    def note(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda scores: (order.append(name), scores)[1]

    where = ac.Where(blocks=("mid",))
    with ac.control(pipe, Scores(edit=note("first"), where=where), Scores(edit=note("second"), where=where)):
        tiny.draw(pipe, steps=1)
    assert order == ["first", "second"]


def test_a_mask_without_four_axes_is_refused() -> None:
    pipe = tiny.sd()
    with (
        pytest.raises(ac.ControlError, match=r"Mask\.mask returned a mask of shape \(64, 7\) at down_blocks.*4 axes"),
        ac.control(pipe, Mask(make=lambda call: torch.ones(64, 7, dtype=torch.bool))),
    ):
        tiny.draw(pipe, steps=1)
