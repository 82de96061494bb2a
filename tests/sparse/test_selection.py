"""Draft, and the random and oracle rows: what they choose, in which order, and how good the choice is."""

from __future__ import annotations

import pytest
import torch

import attnctrl as ac
from attnctrl.controls.sparse.oracle_blocks import block_mass
from attnctrl.controls.sparse.selection import Tiles
from attnctrl.kernels import BlockAxis, attention, draft_map
from attnctrl.sites import Call
from tests.methods import step
from tests.sparse.calls import GRID, a_call, attended, dense, sampling
from tests.sparse.table import SMALL

TILE = (1, 4, 4)


def tiles_of(control: ac.Control, call: Call, sink: int = 0) -> Tiles:
    return Tiles.of(call, control.begin(sampling(call.queries.grid)), TILE, 16, sink)


def blocks_of(tiles: Tiles, mask: torch.Tensor) -> torch.Tensor:
    """The visited blocks as a mask of the sequence's own tokens, (batch, heads, tokens, tokens)."""
    place = tiles.axis.block_of_token()[0]
    back = tiles.order.inverse[0]
    return mask[:, :, place[:, None], place][:, :, back[:, None], back]


def test_the_order_is_the_published_one() -> None:
    """Two frames of 4x4 in pools of 2x2."""
    call = a_call((2, 4, 4), before=3)
    made = Tiles.of(call, ac.Draft().begin(sampling((2, 4, 4))), (1, 2, 2), 16, 0)
    frame = [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert made.order.order[0].tolist() == [0, 1, 2, *(3 + n for n in frame), *(19 + n for n in frame)]
    assert torch.equal(made.order.order[0][made.order.inverse[0]], torch.arange(35))


@pytest.mark.parametrize(("grid", "blocks"), [((33, 48, 80), 990), ((21, 48, 80), 630), ((21, 32, 48), 252)])
def test_the_published_grids(grid: tuple[int, int, int], blocks: int) -> None:
    made = Tiles.of(a_call(grid, heads=1, head_dim=1), ac.Draft().begin(sampling(grid)), (1, 8, 16), 128, 0)
    assert made.axis.segments == (128,) * blocks


def test_720p_has_short_pools_at_its_lower_border() -> None:
    grid = (3, 45, 80)
    made = Tiles.of(a_call(grid, heads=1, head_dim=1), ac.Draft().begin(sampling(grid)), (1, 8, 16), 128, 0)
    assert made.axis.segments == ((128,) * 25 + (80,) * 5) * 3


@pytest.mark.parametrize("scope", ["head", "row"])
def test_draft_visits_the_top_of_its_map_and_the_diagonal(scope: str) -> None:
    control, call = ac.Draft(density=0.25, scope=scope, block=16, **SMALL), a_call(batch=2)
    made = tiles_of(control, call)
    query, key = made.ordered(call)
    scores = draft_map(query, key, made.axis, made.axis, call.scale)
    count = made.axis.blocks
    ranked = scores.masked_fill(torch.eye(count, dtype=torch.bool), 2.0)
    flat = ranked.flatten(2) if scope == "head" else ranked
    least = flat.sort(dim=-1, descending=True).values[..., -(-flat.shape[-1] // 4) - 1]
    kept = ranked >= (least[..., None, None] if scope == "head" else least[..., None])
    expected = -(-count * count // 4) if scope == "head" else count * -(-count // 4)
    assert kept.flatten(2).sum(dim=-1).unique().tolist() == [expected]
    output, report = attended(control, call)
    mask = blocks_of(made, kept)
    torch.testing.assert_close(output, dense(call, mask), atol=2e-6, rtol=1e-4)
    (visit,) = report.visits.values()
    assert visit.share == pytest.approx(float(mask.float().mean()))


@pytest.mark.parametrize("mass", [0.3, 0.8])
def test_by_mass_each_row_takes_as_many_as_it_needs(mass: float) -> None:
    call = a_call(spread=2.0)
    made = tiles_of(ac.OracleBlocks(), call)
    query, key = made.ordered(call)
    scores = block_mass(query, key, made.axis, call.scale)
    visited = made.top(scores, 0.25, "row", mass).visited
    held = (scores * visited).sum(dim=-1) / scores.sum(dim=-1)
    assert (held >= mass - 1e-5).all()
    assert len(visited.sum(dim=-1).unique()) > 1
    _, report = attended(ac.OracleBlocks(mass=mass, scope="row", block=16, **SMALL), call)
    (visit,) = report.visits.values()
    assert 0.02 < float(visit.share) < mass


def test_a_sink_is_seen_by_all() -> None:
    made = tiles_of(ac.Draft(), a_call(), sink=1)
    frame = made.order.order[0] < 60
    first = made.axis.block_of_token()[0][frame].unique()
    assert made.forced[:, first].all()
    assert int(made.forced.sum()) == made.axis.blocks * len(first) + (made.axis.blocks - len(first))


def test_the_mass_of_blocks_is_that_of_the_probabilities() -> None:
    call = a_call((2, 5, 7), heads=3)
    axis = BlockAxis((30, 40), 16)
    mass = block_mass(call.query, call.key, axis, call.scale)
    probs = (call.query @ call.key.transpose(-1, -2) * call.scale).softmax(dim=-1)
    place = axis.block_of_token()[0]
    for row in range(axis.blocks):
        for column in range(axis.blocks):
            expected = probs[:, :, place == row][..., place == column].sum(dim=(-2, -1))
            torch.testing.assert_close(mass[:, :, row, column], expected)
    torch.testing.assert_close(mass.sum(dim=-1), axis.bounds()[1].float().expand(1, 3, -1))


def local(grid: tuple[int, int, int] = (4, 8, 16)) -> Call:
    """Attention that is near in space and steady over frames, as that of videos: features of the place."""
    frames, height, width = grid
    call = a_call(grid, heads=2, head_dim=16)
    place = torch.cartesian_prod(torch.arange(frames), torch.arange(height), torch.arange(width)).float()
    waves = torch.linspace(0.2, 0.8, 4)
    turns = torch.cat([f(place[:, axis, None] * waves) for axis in (1, 2) for f in (torch.sin, torch.cos)], dim=-1)
    features = 3 * turns[None, None] + 0.3 * call.query
    return call.change(query=features, key=features + 0.3 * call.key)


def error(control: ac.Control, call: Call) -> float:
    output, _ = attended(control, call)
    assert output is not None
    return float((output - dense(call)).norm() / dense(call).norm())


def test_the_oracle_beats_draft_which_beats_chance() -> None:
    call, same = local(), {"density": 0.2, "block": 16, **SMALL}
    errors = [error(make(**same), call) for make in (ac.OracleBlocks, ac.Draft, ac.RandomBlocks)]
    print("relative errors at density 0.2, oracle, draft, random:", [f"{one:.3f}" for one in errors])
    assert errors[0] <= errors[1] < 0.7 * errors[2]


def test_random_blocks_repeat_with_their_seed_and_not_otherwise() -> None:
    def drawn(seed: int = 0, index: int = 40, layer: int = 0, branch: str = "cond") -> torch.Tensor:
        control = ac.RandomBlocks(density=0.3, seed=seed, block=16, **SMALL)
        output, report = attended(control, a_call(at=step(index), layer=layer, branch=branch))
        (visit,) = report.visits.values()
        assert float(visit.share) == pytest.approx(0.3, abs=0.04)
        assert output is not None
        return output

    first = drawn()
    assert torch.equal(first, drawn())
    assert torch.equal(first, drawn(branch="uncond"))
    for other in (drawn(seed=1), drawn(index=41), drawn(layer=1)):
        assert not torch.allclose(other, first, atol=1e-3)


def test_on_a_gpu_the_share_is_told_and_not_counted() -> None:
    """A device whose tensors cannot be read: nothing waits."""
    call = a_call((4, 8, 8), before=32)
    made = tiles_of(ac.Draft(), call)
    visited = torch.ones(1, 2, made.axis.blocks, made.axis.blocks, dtype=torch.bool, device="meta")
    mask = made.sequence.chosen(made.axis, visited, 0.25)
    pairs, text = 288**2, 288**2 - 256**2
    assert mask.known_density() == pytest.approx((text + 0.25 * 256**2) / pairs)


def test_the_dense_part_of_the_sequence_is_attended_in_full() -> None:
    call = a_call(GRID, before=7)
    output, _ = attended(ac.Draft(density=0.1, block=16, **SMALL), call)
    assert output is not None
    text = attention(call.query[:, :, :7], call.key, call.value, None, call.scale)
    torch.testing.assert_close(output[:, :, :7], text, atol=2e-6, rtol=1e-4)
