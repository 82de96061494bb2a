"""Which blocks are visited: pooled maps, the top of a row, the mass of a row, against values worked out by hand."""

from __future__ import annotations

import pytest
import torch

from attnctrl.kernels.blocks_axis import BlockAxis
from attnctrl.kernels.blocks_select import block_means, draft_map, mass_blocks, top_blocks

SCORES = torch.tensor([[[[0.5, 0.2, 0.2, 0.1], [0.0, 0.3, 0.1, 0.6]]]])
DIAGONAL = torch.eye(2, 4, dtype=torch.bool)


def places(chosen: torch.Tensor) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in chosen.flatten(0, 2)]


def test_means_are_of_the_tokens_that_a_block_has() -> None:
    axis = BlockAxis((20, 3), 16)
    tensor = torch.arange(23.0).view(1, 1, 23, 1)
    assert block_means(tensor, axis).flatten().tolist() == [7.5, 17.5, 21.0]
    assert block_means(tensor.bfloat16(), axis).dtype == torch.float32


def test_the_draft_is_the_attention_of_means() -> None:
    axis = BlockAxis((32,), 16)
    query, key = torch.zeros(2, 1, 1, 32, 2)
    query[..., :16, 0], query[..., 16:, 1] = 1.0, 3.0
    key[..., 16:, 0] = 2.0
    weights = torch.tensor([0.0, 2 * 0.5]).softmax(dim=0)
    wanted = torch.stack((weights, torch.tensor([0.5, 0.5])))
    torch.testing.assert_close(draft_map(query, key, axis, axis, 0.5)[0, 0], wanted)


def test_the_draft_of_equal_tokens_is_uniform() -> None:
    axis = BlockAxis((50,), 16)
    same = torch.ones(1, 2, 50, 4)
    torch.testing.assert_close(draft_map(same, same, axis, axis, 0.5), torch.full((1, 2, 4, 4), 0.25))


def test_the_top_of_each_row() -> None:
    assert places(top_blocks(SCORES, 0.25)) == [[0], [3]]
    assert places(top_blocks(SCORES, 0.26)) == [[0, 1], [1, 3]] or places(top_blocks(SCORES, 0.26)) == [[0, 2], [1, 3]]
    assert places(top_blocks(SCORES, 0.01)) == [[0], [3]]
    assert top_blocks(SCORES, 1.0).all()


def test_the_top_of_a_head_may_leave_a_row_empty_unless_it_is_forced() -> None:
    assert places(top_blocks(torch.tensor([[[[3.0, 2.0], [1.0, 0.0]]]]), 0.5, scope="head")) == [[0, 1], []]
    kept = top_blocks(torch.tensor([[[[3.0, 2.0], [1.0, 0.0]]]]), 0.5, torch.eye(2, dtype=torch.bool), "head")
    assert places(kept) == [[0], [1]]


def test_forced_blocks_count_unless_they_are_too_many() -> None:
    assert places(top_blocks(SCORES, 0.5, DIAGONAL))[1] == [1, 3]
    assert places(top_blocks(SCORES, 0.25, DIAGONAL)) == [[0], [1]]
    both = torch.tensor([True, True, False, False])
    assert places(top_blocks(SCORES, 0.25, both)) == [[0, 1], [0, 1]]


@pytest.mark.parametrize("density", [0.07, 0.1, 0.29, 0.3, 0.57])
def test_a_density_is_not_rounded_past_whole_blocks(density: float) -> None:
    scores = torch.rand(1, 1, 1, 100, generator=torch.Generator().manual_seed(0))
    assert int(top_blocks(scores, density).sum()) == round(100 * density)


def test_the_fewest_blocks_with_a_mass() -> None:
    assert places(mass_blocks(SCORES, 0.5)) == [[0], [3]]
    assert [len(row) for row in places(mass_blocks(SCORES, 0.6))] == [2, 1]
    assert places(mass_blocks(SCORES, 0.95)) == [[0, 1, 2, 3], [1, 2, 3]]
    assert places(mass_blocks(SCORES, 1.0)) == [[0, 1, 2, 3], [1, 2, 3]]
    assert places(mass_blocks(torch.zeros(1, 1, 1, 3), 0.5)) == [[0]]


def test_forced_mass_counts_first() -> None:
    # The second row's 0.3 is forced; 0.6 more reaches 0.8, which 0.6 + 0.3 would have done too: both rows keep two.
    assert places(mass_blocks(SCORES, 0.3, DIAGONAL)) == [[0], [1]]
    assert places(mass_blocks(SCORES, 0.8, DIAGONAL))[1] == [1, 3]
    last = torch.tensor([False, False, False, True])
    assert places(mass_blocks(SCORES, 0.05, last)) == [[3], [3]]


def test_the_mass_of_a_head() -> None:
    assert places(mass_blocks(SCORES, 0.5, scope="head")) == [[0], [3]]
    assert places(mass_blocks(SCORES, 0.29, scope="head")) == [[], [3]]


@pytest.mark.parametrize("select", [top_blocks, mass_blocks])
@pytest.mark.parametrize("share", [0.0, 1.1, -0.5])
def test_shares_out_of_range_are_refused(select: object, share: float) -> None:
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        select(SCORES, share)  # type: ignore[operator]
    with pytest.raises(ValueError, match='choose "row" or "head"'):
        select(SCORES, 0.5, scope="all")  # type: ignore[operator]
