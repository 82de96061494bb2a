"""720p grids and odd numbers of frames through every control, and what skipping saves on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import attnctrl as ac
from attnctrl.sites import Call, Grid
from tests.methods import step
from tests.sparse.calls import SITES, a_call, attended, dense, sampling
from tests.sparse.table import SMALL, plan

GRID = (3, 45, 80)
"""Three latent frames of 720p: 10800 tokens, none of whose sides a tile divides."""
CONTROLS: dict[str, Callable[[], ac.Control]] = {
    "radial": lambda: ac.Radial(decay=0.2, **SMALL),
    "neighborhood-tiles": lambda: ac.NeighborhoodTiles(density=0.1, **SMALL),
    "sliding-tile": lambda: ac.SlidingTile(density=0.1, **SMALL),
    "draft": lambda: ac.Draft(density=0.1, **SMALL),
    "draft, 64": lambda: ac.Draft(density=0.1, block=64, **SMALL),
    "paro": lambda: ac.Paro(plan(GRID, SITES, 1), **SMALL),
    "rettention": lambda: ac.Rettention(**SMALL),
    "vmoba": lambda: ac.VMoBA(mode="top", **SMALL),
    "random-blocks": lambda: ac.RandomBlocks(density=0.1, **SMALL),
    "oracle-blocks": lambda: ac.OracleBlocks(density=0.1, **SMALL),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTROLS)
def test_720p(name: str) -> None:
    control = CONTROLS[name]()
    grid = (9, 45, 80) if name == "radial" else GRID  # of three frames it skips little
    state = control.begin(sampling(grid))
    call = a_call(grid, heads=1, head_dim=8, layer=2, before=226)
    if name == "rettention":
        control.attend(call, state)
    output = control.attend(call.change(step=step(41)), state)
    assert output is not None
    assert torch.isfinite(output).all()
    visit = state.report.visits[SITES[2].name, 41, "cond"]
    print(f"{name}: {100 * float(visit.share):.1f}% of the pairs, by {visit.form}")
    assert 0 < float(visit.share) < 0.75
    text = F.scaled_dot_product_attention(call.query[:, :, :226], call.key, call.value)
    torch.testing.assert_close(output[:, :, :226], text, atol=1e-5, rtol=1e-3)


def seconds(run: Callable[[], Any]) -> float:
    """Processor time of one call, so that other programs on the machine count little."""
    start = time.process_time()
    run()
    return time.process_time() - start


FAST: dict[str, tuple[ac.Control, Grid]] = {
    "radial": (ac.Radial(decay=0.2), (33, 16, 16)),
    "neighborhood-tiles": (ac.NeighborhoodTiles(density=0.2), (8, 32, 32)),
    "sliding-tile": (ac.SlidingTile(density=0.2), (8, 32, 32)),
    "draft": (ac.Draft(density=0.2), (8, 32, 32)),
    "draft, 4096 tokens": (ac.Draft(density=0.2), (8, 16, 32)),
    "draft, blocks of 64": (ac.Draft(density=0.2, block=64), (8, 32, 32)),
    "random-blocks": (ac.RandomBlocks(density=0.2), (8, 32, 32)),
    "agent-attention": (ac.AgentAttention(), (1, 64, 64)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAST)
def test_skipping_saves_time_on_a_cpu(name: str) -> None:
    """With everything that the control does beside the attention."""
    control, grid = FAST[name]
    call = a_call(grid, head_dim=64, at=step(10))
    state = control.begin(sampling(grid))
    first = control.attend(call, state)  # makes what is made once
    assert first is not None
    sparse, full = [], []
    with torch.no_grad():
        for _ in range(5):  # in turn, so that both meet the same machine
            sparse.append(seconds(lambda: control.attend(call, state)))
            full.append(seconds(lambda: dense(call)))
    ratio = min(sparse) / min(full)
    print(f"{name}: {ratio:.2f} of full attention's time at {100 * state.report.visited():.1f}% of the pairs")
    assert ratio < 1


def test_a_dense_choice_is_left_full() -> None:
    call: Call = a_call((8, 16, 32), head_dim=16)
    output, report = attended(ac.Draft(density=0.8), call)
    assert output is None
    assert "skipped nothing: a density of 0.56 or more in blocks of 128" in str(report)
