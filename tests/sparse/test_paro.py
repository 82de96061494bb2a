"""PAROAttention: orders, the choice of one, plans and their files, calibration on tiny pipelines, 8 bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import attnctrl as ac
from attnctrl.controls.sparse.paro_calibration import block_statistics, order_costs
from attnctrl.controls.sparse.paro_plan import AXES, ParoPlan, SitePlan, axis_orders, packed
from attnctrl.kernels import BlockAxis, TokenOrder
from attnctrl.pipelines import calibrate_paro
from attnctrl.processors import family_of
from tests.methods import step
from tests.probes import REGIONS
from tests.sparse.calls import GRID, SITES, a_call, attended, dense
from tests.sparse.table import SMALL, plan
from tests.transformers import draw
from tests.videos import VIDEOS


def test_the_orders_are_those_of_the_official_code() -> None:
    grid = (2, 3, 4)
    tokens = torch.arange(24).view(grid)
    names = ("fhw", "fwh", "hwf", "hfw", "whf", "wfh")
    for number, name in enumerate(names):
        expected = torch.einsum(f"fhw->{name}", tokens).flatten()
        assert torch.equal(axis_orders(grid)[number], expected)
        made = TokenOrder.of(axis_orders(grid)[number])
        tensor = torch.arange(24.0).view(1, 1, 24, 1)
        assert torch.equal(made.restore(made.apply(tensor)), tensor)
    assert len({tuple(one.tolist()) for one in axis_orders(grid)}) == len(AXES) == 6


def alike(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key under which tokens of equal features, (tokens,), attend to each other alone."""
    sharp = 40.0 * torch.nn.functional.one_hot(features, int(features.max()) + 1).float()[None, None]
    return sharp, sharp


def costs(features: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    axis = BlockAxis((len(features),), 16)
    mean, peak = block_statistics(*alike(features), axis_orders(grid), axis, 1.0)
    return order_costs(mean, peak, len(features), 0.5)[0]


def test_the_order_that_suits_is_chosen() -> None:
    """Places that attend to themselves over frames want frames to be the fastest axis; whole frames, the slowest."""
    grid = (4, 4, 8)
    frame, row, column = torch.cartesian_prod(*(torch.arange(n) for n in grid)).unbind(1)
    assert int(costs(row * 8 + column, grid).argmin()) in (2, 4)
    assert int(costs(frame, grid).argmin()) in (0, 1)
    assert int(costs(row, grid).argmin()) in (2, 3)  # rows slowest


def test_statistics_against_the_probabilities() -> None:
    call, grid = a_call((2, 4, 5), heads=2), (2, 4, 5)
    axis = BlockAxis((40,), 16)
    mean, peak = block_statistics(call.query, call.key, axis_orders(grid), axis, call.scale)
    probs = (call.query @ call.key.transpose(-1, -2) * call.scale).softmax(dim=-1)
    for number, order in enumerate(axis_orders(grid)):
        moved = probs[:, :, order][..., order]
        for row in range(3):
            for column in range(3):
                block = moved[:, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
                torch.testing.assert_close(mean[:, :, number, row, column], block.mean(dim=(-2, -1)))
                torch.testing.assert_close(peak[:, :, number, row, column], block.amax(dim=(-2, -1)))


@pytest.mark.parametrize("number", range(6))
def test_in_every_order_all_blocks_are_full_attention(number: int) -> None:
    blocks = 19
    everything = packed(torch.ones(2, blocks, blocks, dtype=torch.bool))
    sites = {site.name: SitePlan(GRID, torch.tensor([number, 0]), {0: everything}) for site in SITES}
    call = a_call(before=5, batch=2)
    output, _ = attended(ac.Paro(ParoPlan(16, 1.0, 1, sites), **SMALL), call)
    torch.testing.assert_close(output, dense(call), atol=2e-6, rtol=1e-4)


def test_the_masks_hold_in_the_order_of_each_head() -> None:
    call = a_call(layer=1)
    output, _ = attended(ac.Paro(plan(), **SMALL), call)
    site = plan().sites[SITES[1].name]
    kept = site.visited(0, 19)
    mask = torch.zeros(1, 2, 300, 300, dtype=torch.bool)
    for head in range(2):
        place = torch.empty(300, dtype=torch.int64)
        place[axis_orders(GRID)[site.order[head]]] = torch.arange(300) // 16
        mask[0, head] = kept[head][place[:, None], place]
    torch.testing.assert_close(output, dense(call, mask), atol=2e-6, rtol=1e-4)


def test_each_phase_has_its_masks_and_unknown_ones_the_nearest() -> None:
    kinds = [torch.rand(2, 19, 19, generator=torch.Generator().manual_seed(n)) < 0.5 for n in range(2)]
    site = SitePlan(GRID, torch.tensor([0, 5]), {1: packed(kinds[0]), 3: packed(kinds[1])})
    for phase, kind in ((0, 0), (1, 0), (2, 0), (3, 1)):
        assert torch.equal(site.visited(phase, 19), kinds[kind])
    both = ParoPlan(16, 0.5, 4, {one.name: site for one in SITES})
    outputs = [attended(ac.Paro(both, **SMALL), a_call(at=step(index)))[0] for index in (0, 12, 13, 49)]
    assert torch.equal(outputs[0], outputs[1])  # type: ignore[arg-type]
    assert torch.equal(outputs[0], outputs[2])  # type: ignore[arg-type]
    assert not torch.allclose(outputs[0], outputs[3])  # type: ignore[arg-type]


def test_a_file_gives_the_plan_back(tmp_path: Path) -> None:
    made = plan()
    made.save(tmp_path / "plan.safetensors")
    read = ParoPlan.load(str(tmp_path / "plan.safetensors"))
    assert (read.block, read.density, read.phases) == (made.block, made.density, made.phases)
    assert read.sites.keys() == made.sites.keys()
    for name, site in made.sites.items():
        other = read.sites[name]
        assert other.grid == site.grid
        assert torch.equal(other.order, site.order)
        assert {phase: bits.tolist() for phase, bits in other.masks.items()} == {0: site.masks[0].tolist()}
    call = a_call()
    by_file, _ = attended(ac.Paro(tmp_path / "plan.safetensors", **SMALL), call)
    assert torch.equal(by_file, attended(ac.Paro(made, **SMALL), call)[0])  # type: ignore[arg-type]


def test_files_that_are_no_plan_say_so(tmp_path: Path) -> None:
    with pytest.raises(ac.ControlError, match=r"no PAROAttention plan at .*missing: make one with pipelines"):
        attended(ac.Paro(str(tmp_path / "missing")), a_call())
    save_file({"a/order": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ac.ControlError, match="no PAROAttention plan of the format attnctrl-paro-1"):
        ParoPlan.load(tmp_path / "other")
    (tmp_path / "text").write_text("a plan")
    with pytest.raises(ac.ControlError, match=r"text is no PAROAttention plan: "):
        ParoPlan.load(tmp_path / "text")


def test_plans_of_other_models_and_sizes_are_refused() -> None:
    with pytest.raises(ac.ControlError, match=r"is for latents .* \(5, 6, 10\) at blocks\.0\.attn, .* \(4, 6, 10\)"):
        attended(ac.Paro(plan()), a_call((4, 6, 10)))
    with pytest.raises(ac.ControlError, match=r"knows no layer blocks\.1\.attn: it was calibrated on another"):
        attended(ac.Paro(plan(sites=SITES[:1])), a_call())
    with pytest.raises(ac.ControlError, match=r"plan is for 2 heads at blocks\.0\.attn, which has 3"):
        attended(ac.Paro(plan()), a_call(heads=3))


def test_8_bits_after_the_reordering_are_near() -> None:
    call = a_call(head_dim=64, before=7)
    exact, _ = attended(ac.Paro(plan(), **SMALL), call)
    rounded, report = attended(ac.Paro(plan(), int8=True, **SMALL), call)
    assert exact is not None
    assert rounded is not None
    cosine = torch.nn.functional.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0)
    print(f"8 bits: cosine {float(cosine):.6f}")
    assert 0.999 < float(cosine) < 1 - 1e-9
    assert next(iter(report.visits.values())).form == "int8"


def test_8_bits_have_no_gradients_for_a_loss() -> None:
    pipe = VIDEOS["cogvideox"].make()
    with (
        pytest.raises(ac.ControlError, match="Paro and Refocus cannot work together: attention in 8 bits has no"),
        ac.control(pipe, ac.Paro(plan(), int8=True), ac.Refocus(REGIONS)),
    ):
        pass
    with ac.control(pipe, ac.Paro(plan()), ac.Refocus(REGIONS)):
        pass


@pytest.mark.parametrize("name", ["cogvideox", "wan-experts"])
def test_calibration_end_to_end(name: str, tmp_path: Path) -> None:
    family = VIDEOS[name]
    pipe = family.make()

    def run(*controls: ac.Control, **more: Any) -> Any:
        with ac.control(pipe, *controls, record=False) as found:
            return draw(pipe, family, steps=4, **more), found

    stock, _ = run()
    calls = []

    def short() -> None:
        calls.append(1)
        draw(pipe, family, steps=4)

    made = calibrate_paro(pipe, short, density=0.4, phases=2, block=16)
    assert len(calls) == 2
    assert torch.equal(run()[0], stock)  # the pipeline is what it was
    sites = {site.name for site, _ in family_of(pipe).sites() if site.kind in ("self", "joint")}
    assert made.sites.keys() == sites
    tokens = family.grid[0] * family.grid[1] * family.grid[2]
    blocks = -(-tokens // 16)
    for site in made.sites.values():
        assert site.grid == family.grid
        assert ((site.order >= 0) & (site.order < 6)).all()
        for phase in site.masks:
            kept = site.visited(phase, blocks)
            assert kept.diagonal(dim1=1, dim2=2).all()
            assert kept.flatten(1).sum(dim=1).tolist() == [-(-2 * blocks * blocks // 5)] * len(site.order)
    assert name != "cogvideox" or all(site.masks.keys() == {0, 1} for site in made.sites.values())
    made.save(tmp_path / "plan")
    found, report = run(ac.Paro(tmp_path / "plan", fall_back=False))
    assert torch.isfinite(found).all()
    assert not torch.allclose(found, stock, atol=1e-4)
    assert all(0.3 < float(visit.share) < 0.75 for visit in report.report.visits.values())
    everything = calibrate_paro(pipe, short, density=1.0, phases=2, block=16)
    same, _ = run(ac.Paro(everything, fall_back=False))
    torch.testing.assert_close(same, stock, atol=2e-4, rtol=1e-3)


def test_calibrations_that_cannot_be() -> None:
    family = VIDEOS["cogvideox"]
    pipe = family.make()
    with pytest.raises(ac.ControlError, match=r"calibrate_paro\(density=0, phases=4, block=64\): give a density"):
        calibrate_paro(pipe, lambda: None, density=0)
    with pytest.raises(ac.ControlError, match=r"draw\(\) did not call the pipeline"):
        calibrate_paro(pipe, lambda: None)
    wider = replace(family, size=(64, 128))

    def two() -> None:
        draw(pipe, family, steps=1)
        draw(pipe, wider, steps=1)

    with pytest.raises(ac.ControlError, match="a plan is for one size"):
        calibrate_paro(pipe, two, block=16)
