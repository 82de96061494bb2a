"""Sparse controls on tiny pipelines of every family: they act in both branches, keep their steps, and say what ran."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

import attnctrl as ac
from attnctrl.processors import family_of
from tests import tiny
from tests.parts import Tiny
from tests.probes import REGIONS, Scores
from tests.sparse.table import SMALL, full_controls, sparse_controls
from tests.transformers import FAMILIES, draw
from tests.videos import VIDEOS
from tests.wan import wan_experts


def larger(family: Tiny) -> Tiny:
    """Twice as high and wide, so that there is something to skip."""
    (height, width), (frames, rows, columns) = family.size, family.grid
    return replace(family, size=(2 * height, 2 * width), grid=(frames, 2 * rows, 2 * columns))


PIPELINES = {name: larger(family) for name, family in {**VIDEOS, "flux": FAMILIES["flux"]}.items()}
METHODS = tuple(sparse_controls())
ON_PICTURES = ("draft", "paro", "rettention", "neighborhood-tiles", "neighborhood-tiles, sliding")
"""The others see one frame whole: by a sink, a chunk of frames, or as frames at most one apart."""
ACTING = [(name, method) for name in ("wan", "hunyuan", "cogvideox", "ltx") for method in METHODS]
ACTING += [("flux", method) for method in ON_PICTURES]
FULL = [(name, method) for name in ("wan", "hunyuan", "cogvideox") for method in full_controls()]
FULL += [(name, method) for name in PIPELINES for method in ("draft", "paro") if (name, method) not in FULL]


@cache
def pipeline(name: str) -> Any:
    return PIPELINES[name].make()


def latents(pipe: Any) -> Any:
    """The sites of a pipeline where latents attend to latents."""
    return tuple(site for site, _ in family_of(pipe).sites() if site.kind in ("self", "joint"))


@cache
def drawn(name: str, method: str = "", full: bool = False, steps: int = 2) -> tuple[torch.Tensor, Any]:
    """The latents of a short guided run under a method, and the run."""
    pipe, family = pipeline(name), PIPELINES[name]
    table = full_controls if full else sparse_controls
    controls = [table(family.grid, latents(pipe))[method]] if method else []
    with ac.control(pipe, *controls, record=False) as run:
        return draw(pipe, family, steps=steps), run


@pytest.mark.parametrize(("name", "method"), ACTING)
def test_it_acts_at_every_layer_and_branch(name: str, method: str) -> None:
    # Three steps: Rettention's first is dense.
    found, run = drawn(name, method, steps=3)
    stock, _ = drawn(name, steps=3)
    assert torch.isfinite(found).all()
    assert not torch.allclose(found, stock, atol=1e-4)
    visits = run.report.visits
    sites = {site.name for site in latents(pipeline(name))}
    branches = {branch for _, _, branch in visits}
    assert "cond" in branches
    assert {(site, step, branch) for site in sites for step in range(3) for branch in branches} == set(visits)
    sparse = [visit for visit in visits.values() if not visit.why]
    assert sparse
    assert all(0 < float(visit.share) <= 1 for visit in sparse)
    assert 0 < run.report.visited() < 1
    assert f"{sparse[0].control}: {len(sparse)} calls visited" in str(run.report)


@pytest.mark.parametrize(("name", "method"), FULL)
def test_at_full_density_it_is_the_stock_picture(name: str, method: str) -> None:
    found, _ = drawn(name, method, full=True)
    stock, _ = drawn(name)
    torch.testing.assert_close(found, stock, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("method", ["radial", "draft"])
def test_by_default_small_models_stay_full_and_the_report_says_why(method: str) -> None:
    control = replace(sparse_controls()[method], fall_back=True, block=128)
    pipe, family = pipeline("wan"), PIPELINES["wan"]
    with ac.control(pipe, control, record=False) as run:
        found = draw(pipe, family, steps=2)
    torch.testing.assert_close(found, drawn("wan")[0], atol=1e-5, rtol=1e-4)
    assert run.report.visited() == 1.0
    assert "visited 100.0% of the pairs, skipped nothing: fewer than 8 blocks of keys" in str(run.report)


def test_dense_steps_are_stock_to_the_bit() -> None:
    """A window that begins later leaves the steps before it alone, and one that ends sooner those after it."""
    pipe, family = pipeline("wan"), PIPELINES["wan"]
    seen: dict[str, list[torch.Tensor]] = {}
    for name, window in (("stock", None), ("late", ac.Window(0.5, 1.0)), ("middle", ac.Window(0.25, 0.5))):
        kept = seen.setdefault(name, [])

        def keep(_: Any, step: int, timestep: Any, values: dict, kept: list = kept) -> dict:
            kept.append(values["latents"].clone())
            return values

        controls = [] if window is None else [replace(sparse_controls()["draft"], window=window)]
        with ac.control(pipe, *controls, record=False) as run:
            draw(pipe, family, steps=4, callback_on_step_end=keep)
        if controls:
            assert run.report.rows[0, "attend"].steps == ({2, 3} if name == "late" else {1})
    for step in range(4):
        assert torch.equal(seen["late"][step], seen["stock"][step]) == (step < 2)
        assert torch.equal(seen["middle"][step], seen["stock"][step]) == (step < 1)


def test_dense_layers_are_the_first_of_each_denoiser() -> None:
    pipe = wan_experts(layers=3)
    control = replace(sparse_controls()["draft"], where=ac.Where(kinds=("self", "joint"), skip=2))
    with ac.control(pipe, control, record=False) as run:
        draw(pipe, PIPELINES["wan-experts"], steps=4)
    assert run.report.rows[0, "attend"].sites == {"blocks.2.attn1", "transformer_2.blocks.2.attn1"}


@pytest.mark.parametrize("method", METHODS)
def test_steps_that_a_cache_skips_do_no_harm(method: str) -> None:
    """A cache that skips a layer's calls in some steps: what the layer does in the others is its own."""
    pipe, family = pipeline("wan"), PIPELINES["wan"]
    control = sparse_controls(family.grid, latents(pipe))[method]
    block, kept = pipe.transformer.blocks[0], {}

    def cached(*args: Any, **kwargs: Any) -> torch.Tensor:
        kept["calls"] = kept.get("calls", 0) + 1
        if kept["calls"] in (3, 4, 7, 8):  # steps 1 and 3, both branches
            return args[0] + kept[kept["calls"] % 2]
        output = type(block).forward(block, *args, **kwargs)
        kept[kept["calls"] % 2] = output - args[0]
        return output

    block.forward = cached
    try:
        with ac.control(pipe, control, record=False) as run:
            found = draw(pipe, family, steps=5)
    finally:
        del block.forward
    assert torch.isfinite(found).all()
    assert {step for _, step, _ in run.report.visits} == {0, 2, 4}


def test_regions_in_cross_attention_beside_sparse_self_attention() -> None:
    pipe, family = pipeline("wan"), PIPELINES["wan"]
    regions = ac.RegionMask(REGIONS, window=ac.Window())
    controls = (regions, sparse_controls()["draft"])
    with ac.control(pipe, *controls, record=False) as run:
        found = draw(pipe, family, steps=2)
    assert {row.control for row in run.report.rows.values()} == {"RegionMask", "Draft"}
    for alone in controls:
        with ac.control(pipe, alone, record=False):
            assert not torch.allclose(draw(pipe, family, steps=2), found, atol=1e-5)


@pytest.mark.parametrize("method", ["radial", "draft", "paro"])
@pytest.mark.parametrize("name", ["cogvideox", "hunyuan"])
def test_regions_and_sparsity_in_one_joint_attention(name: str, method: str) -> None:
    """At full density beside token groups of regions it is the regions alone."""
    pipe, family = pipeline(name), PIPELINES[name]
    regions = ac.RegionMask(REGIONS, boost=0.0, window=ac.Window())
    pictures = {}
    for full, table in ((True, full_controls), (False, sparse_controls)):
        with ac.control(pipe, regions, table(family.grid, latents(pipe))[method], record=False) as run:
            pictures[full] = draw(pipe, family, steps=2)
        assert {row.control for row in run.report.rows.values()} == {"RegionMask", type(run.controls[1]).__name__}
    with ac.control(pipe, regions, record=False):
        alone = draw(pipe, family, steps=2)
    torch.testing.assert_close(pictures[True], alone, atol=2e-4, rtol=1e-3)
    assert not torch.allclose(pictures[False], alone, atol=1e-4)


def test_edited_scores_and_a_replacement_at_one_site_are_refused() -> None:
    pipe, family = pipeline("wan"), PIPELINES["wan"]
    both = ac.Where(kinds=("self", "cross"))
    with (
        pytest.raises(ac.ControlError, match=r"Draft and Scores cannot work together at blocks\.0\.attn1: one"),
        ac.control(pipe, sparse_controls()["draft"], Scores(where=both), record=False),
    ):
        draw(pipe, family, steps=1)
    with ac.control(pipe, sparse_controls()["draft"], Scores(where=ac.Where(kinds=("cross",))), record=False):
        assert torch.isfinite(draw(pipe, family, steps=1)).all()


def test_two_of_them_are_refused_when_attached() -> None:
    table = sparse_controls()
    with (
        pytest.raises(ac.ControlError, match="Radial and Draft cannot work together: both replace the attention"),
        ac.control(pipeline("wan"), table["radial"], table["draft"]),
    ):
        pass


def test_a_loss_reads_maps_beside_sparse_attention() -> None:
    pipe, family = pipeline("cogvideox"), PIPELINES["cogvideox"]
    loss = ac.Refocus(REGIONS, window=ac.Window())
    with ac.control(pipe, loss, sparse_controls(sites=latents(pipe))["radial"], record=False) as run:
        found = draw(pipe, family, steps=2)
    assert torch.isfinite(found).all()
    assert {row.point for row in run.report.rows.values()} >= {"loss", "attend"}


@pytest.mark.parametrize("method", ["draft", "neighborhood-tiles", "rettention", "sliding-tile", "vmoba"])
def test_unets_too(method: str) -> None:
    """Every self-attention layer has its own grid."""
    pipe = tiny.sd()
    control = replace(sparse_controls()[method], where=ac.Where(kinds=("self",)))
    if method == "sliding-tile":
        control = replace(control, sink=0)
    stock = tiny.draw(pipe, steps=3)
    with ac.control(pipe, control, record=False) as run:
        found = tiny.draw(pipe, steps=3)
    assert torch.isfinite(found).all()
    assert not torch.allclose(found, stock, atol=1e-5)
    assert len({site for site, *_ in run.report.visits}) == 7


def test_several_pictures_and_no_guidance() -> None:
    pipe, family = pipeline("flux"), PIPELINES["flux"]
    for options in ({"num_images_per_prompt": 2}, {**family.free}):
        with ac.control(pipe, ac.Draft(block=16, **SMALL), record=False):
            assert torch.isfinite(draw(pipe, family, steps=1, **options)).all()


@pytest.mark.parametrize("method", METHODS)
def test_in_inference_mode_it_is_the_same(method: str) -> None:
    """As ComfyUI runs its models."""
    pipe, family = pipeline("hunyuan"), PIPELINES["hunyuan"]
    expected, _ = drawn("hunyuan", method, steps=3)
    controls = sparse_controls(family.grid, latents(pipe))[method]
    with torch.inference_mode(), ac.control(pipe, controls, record=False):
        torch.testing.assert_close(draw(pipe, family, steps=3), expected, atol=1e-5, rtol=1e-4)
