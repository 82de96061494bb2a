"""torch.compile: controls that only mask run inside the graph; others are refused with a sentence."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch._dynamo.utils import counters

import attnctrl as ac
from attnctrl.kernels import TokenGroups
from attnctrl.sites import Call
from tests import tiny
from tests.probes import REGIONS, Guide, Mask, Nudge, Output, Scores, Token, only_first_key
from tests.spies import assert_restored, snapshot
from tests.transformers import FAMILIES, draw, flux

JOINT = ac.Where(kinds=("joint",))
ALWAYS = ac.Window(0.0, 1.0)


def denoiser(pipe: Any) -> str:
    return "unet" if hasattr(pipe, "unet") else "transformer"


def compile_whole(pipe: Any) -> None:
    setattr(pipe, denoiser(pipe), torch.compile(getattr(pipe, denoiser(pipe)), backend="eager", fullgraph=True))


def compile_in_place(pipe: Any) -> None:
    getattr(pipe, denoiser(pipe)).compile(backend="eager", fullgraph=True)


def compile_blocks(pipe: Any) -> None:
    getattr(pipe, denoiser(pipe)).compile_repeated_blocks(backend="eager", fullgraph=True)


WAYS = {"whole": compile_whole, "in place": compile_in_place, "repeated blocks": compile_blocks}


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # pytest would catch, format and keep every line of torch's structured trace.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def small() -> Any:
    """One level only, because tracing is what costs time here."""
    pipe = tiny.sd()
    torch.manual_seed(0)
    pipe.unet = UNet2DConditionModel(
        block_out_channels=(8,),
        layers_per_block=1,
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()
    return pipe


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("way", WAYS)
def test_masks_run_inside_the_graph(way: str) -> None:
    # Blocks that share a graph are to have different grids and masks.
    pipe = tiny.sd() if way == "repeated blocks" else small()
    control = ac.RegionMask(REGIONS, window=ALWAYS)
    stock = tiny.draw(pipe)
    with ac.control(pipe, control):
        expected = tiny.draw(pipe)
    WAYS[way](pipe)
    before = snapshot(pipe)
    if way != "in place":  # each graph costs seconds
        torch.testing.assert_close(tiny.draw(pipe), stock, atol=1e-5, rtol=1e-5)
    with ac.control(pipe, control) as run:  # record=True keeps no maps here: recording is for the uncompiled model
        drawn = tiny.draw(pipe)
    torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(drawn, stock, atol=1e-3)
    assert len(run.maps) == 0
    (row,) = run.report.rows.values()
    assert row.steps == {0, 1, 2}
    compiled = graphs()
    with ac.control(pipe, control, record=False):
        assert torch.isfinite(tiny.draw(pipe, steps=5)).all()
        again = tiny.draw(pipe)
    assert graphs() == compiled  # neither a step nor another block compiles anything anew
    assert torch.equal(again, drawn)
    assert sum(counters["graph_break"].values()) == 0
    assert_restored(before, pipe)


def test_boolean_masks_and_sampling_points_work_together() -> None:
    """Several masks, windows that end, a batch; and what happens between two steps does not concern the graph."""
    pipe = small()
    mid = ac.Where(kinds=("cross", "self"), blocks=("mid",))
    controls = (
        ac.RegionMask(REGIONS, boost=0.0, window=ac.Window(0.0, 0.5)),
        Mask(make=only_first_key, where=mid),
        Guide(make=lambda prediction: 0.5 * prediction.combined),
        Nudge(),
    )
    with ac.control(pipe, *controls):
        expected = tiny.draw(pipe, num_images_per_prompt=2)
    compile_whole(pipe)
    with ac.control(pipe, *controls):
        drawn = tiny.draw(pipe, num_images_per_prompt=2)
    torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_a_guide_that_runs_the_denoiser_again_gets_it_without_masks(way: str) -> None:
    """As on the uncompiled pipeline, where `Prediction.again` is the stock denoiser."""
    pipe, found = small(), []
    again = Guide(make=lambda prediction: (found.append(prediction.again(None)), prediction.combined)[1])
    mask = Mask(make=only_first_key, where=ac.Where(kinds=("cross", "self")))
    with ac.control(pipe, mask, again):
        tiny.draw(pipe, steps=1)
    WAYS[way](pipe)
    with ac.control(pipe, mask, again):
        tiny.draw(pipe, steps=1)
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found[1], again.got[1].cond, atol=1e-3)


REFUSED: dict[str, tuple[Callable[[], ac.Control], str]] = {
    "a loss": (lambda: ac.LoCo(REGIONS), r"LoCo needs gradients: use the pipeline without torch\.compile"),
    "another loss": (lambda: Token(), r"Token needs gradients"),
    "scores": (lambda: ac.DenseDiffusion(REGIONS), r"DenseDiffusion acts on scores, which a compiled model cannot do"),
    "test scores": (lambda: Scores(), r"Scores acts on scores"),
    "streams": (lambda: ac.RegionPrompts(REGIONS), r"RegionPrompts acts on inputs"),
    "branch": (lambda: Mask(make=only_first_key, branches=("uncond",)), r"Mask acts on the unconditional branch"),
}


@pytest.mark.parametrize("way", ["whole", "in place"])
def test_controls_that_need_more_than_a_mask_are_refused(way: str) -> None:
    """Before anything is traced."""
    pipe = small()
    WAYS[way](pipe)
    before = snapshot(pipe)
    for make, sentence in REFUSED.values():
        with pytest.raises(ac.ControlError, match=sentence), ac.control(pipe, make()):
            tiny.draw(pipe, steps=1)
        assert_restored(before, pipe)
    with pytest.raises(ac.ControlError, match=r"recorded under torch\.compile"), ac.control(pipe, record=["cat"]):
        tiny.draw(pipe, steps=1)
    assert graphs() == 0
    assert_restored(before, pipe)


@pytest.mark.parametrize("way", WAYS)
def test_token_groups_run_inside_the_graph_of_a_joint_model(way: str) -> None:
    """Which mask it is does not concern the graph: entities are hidden from the second half of the run on."""
    pipe, family = flux(), FAMILIES["flux"]
    controls = ac.EliGen(REGIONS, entity_tokens=4, until=0.5), Mask(make=first_text_token_for_all, where=JOINT)
    stock = draw(pipe, family, free=True)
    with ac.control(pipe, *controls):
        expected = draw(pipe, family, free=True)
    WAYS[way](pipe)
    before = snapshot(pipe)
    with ac.control(pipe, *controls) as run:
        drawn = draw(pipe, family, free=True)
    torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(drawn, stock, atol=1e-3)
    assert {row.point for row in run.report.rows.values()} == {"context", "mask"}
    compiled = graphs()
    with ac.control(pipe, *controls):
        assert torch.equal(draw(pipe, family, free=True), drawn)
    assert graphs() == compiled > 0
    assert sum(counters["graph_break"].values()) == 0
    assert_restored(before, pipe)


def first_text_token_for_all(call: Call) -> TokenGroups:
    """Groups that hide the second text token."""
    tokens = call.query.shape[2]
    return TokenGroups.everything(tokens, tokens).hide_keys((torch.arange(tokens) == 1)[None])


def test_both_branches_of_a_joint_model_are_masked_inside_the_graph() -> None:
    """Each in its own call; a dense mask goes in as it is."""
    pipe, family = flux(), FAMILIES["flux"]

    def make(call: Call) -> torch.Tensor:
        return first_text_token_for_all(call).dense()

    for branches in (("cond", "uncond"), ("uncond",)):
        control = Mask(make=make, where=JOINT, branches=branches)
        with ac.control(pipe, control):
            expected = draw(pipe, family, steps=2)
        bare, pipe.transformer = pipe.transformer, torch.compile(pipe.transformer, backend="eager", fullgraph=True)
        with ac.control(pipe, control):
            torch.testing.assert_close(draw(pipe, family, steps=2), expected, atol=1e-4, rtol=1e-4)
        pipe.transformer = bare


JOINT_REFUSED: dict[str, tuple[tuple[ac.Control, ...], str]] = {
    "output": ((Output(where=JOINT),), r"Output acts on output, which a compiled model cannot do"),
    "two kinds of masks": (
        (
            Mask(make=first_text_token_for_all, where=JOINT),
            Mask(make=lambda call: first_text_token_for_all(call).dense(), where=JOINT),
        ),
        r"one control masks by token groups and another by a mask of shape \(1, 1, 36, 36\)",
    ),
}


@pytest.mark.parametrize("name", JOINT_REFUSED)
def test_what_a_compiled_joint_model_cannot_do_is_refused(name: str) -> None:
    controls, sentence = JOINT_REFUSED[name]
    pipe = flux()
    compile_whole(pipe)
    with pytest.raises(ac.ControlError, match=sentence), ac.control(pipe, *controls):
        draw(pipe, FAMILIES["flux"], steps=1)
    assert graphs() == 0


def test_compiling_inside_a_block_is_refused() -> None:
    pipe = small()
    with ac.control(pipe, ac.RegionMask(REGIONS)):
        stock = pipe.unet
        compile_whole(pipe)
        with pytest.raises(ac.ControlError, match=r"compiled inside a control block"), ac.control(pipe):
            pytest.fail("the inner block was entered")
        pipe.unet = stock
