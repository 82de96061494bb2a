"""Sparse blocks as masks: axes, checks, lists, rules, and FlexAttention's BlockMask there and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from attnctrl.kernels.blocks import SparseBlocks
from attnctrl.kernels.blocks_axis import BlockAxis
from attnctrl.kernels.blocks_flex import from_flex, to_flex
from attnctrl.kernels.blocks_lists import block_lists
from attnctrl.kernels.blocks_rule import blocks_from_rule

from .block_masks import MASKS, band, random_blocks


def test_segments_begin_blocks_of_their_own() -> None:
    axis = BlockAxis((20, 5, 32), 16)
    assert (axis.tokens, axis.blocks, axis.uniform) == (57, 5, False)
    first, length = axis.bounds()
    assert first.tolist() == [0, 16, 20, 25, 41]
    assert length.tolist() == [16, 4, 5, 16, 16]
    block, place = axis.block_of_token()
    assert block.tolist() == [0] * 16 + [1] * 4 + [2] * 5 + [3] * 16 + [4] * 16
    assert place[20:26].tolist() == [0, 1, 2, 3, 4, 0]
    assert BlockAxis((32, 20), 16).uniform


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4))
@settings(max_examples=25)
def test_joining_undoes_cutting(segments: list[int]) -> None:
    axis = BlockAxis(tuple(segments), 16)
    tensor = torch.randn(2, 1, axis.tokens, 3, generator=torch.Generator().manual_seed(0))
    blocks = axis.cut(tensor)
    assert blocks.shape == (2, 1, axis.blocks, 16, 3)
    assert torch.equal(axis.join(blocks), tensor)
    assert torch.equal((blocks != 0).all(dim=-1)[0, 0], axis.slots()[1])


@pytest.mark.parametrize(
    ("segments", "size", "sentence"),
    [((), 16, "at least one"), ((3, 0), 16, "one token or more"), ((3,), 48, "choose one of 4, 8, 16, 32, 64, 128")],
)
def test_axes_that_make_no_blocks_are_refused(segments: tuple, size: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        BlockAxis(segments, size)


AXIS = BlockAxis((20,), 16)
VISITED = torch.ones(1, 1, 2, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"visited": VISITED.int()}, "must be bool"),
        ({"visited": VISITED[0]}, "2 query blocks, 2 key blocks"),
        ({"visited": VISITED[..., :1]}, "2 query blocks, 2 key blocks"),
        ({"hidden": torch.zeros(1, 21, dtype=torch.bool)}, r"must be bool \(batch or 1, 20\)"),
        (
            {"hidden": torch.zeros(3, 20, dtype=torch.bool), "visited": VISITED.expand(2, 1, 2, 2)},
            r"batches of \[2, 3\]",
        ),
        ({"pattern": torch.zeros(1, 1, 2, 2, dtype=torch.int32)}, "go together"),
        ({"pattern": VISITED, "patterns": torch.ones(1, 16, 16, dtype=torch.bool)}, "must be int32"),
        (
            {"pattern": VISITED.int(), "patterns": torch.ones(1, 16, 32, dtype=torch.bool)},
            r"must be bool \(patterns, 16, 16\)",
        ),
        ({"share": 1.5}, "from 0 to 1"),
    ],
)
def test_tensors_that_make_no_mask_are_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        SparseBlocks(**{"visited": VISITED, "query_axis": AXIS, "key_axis": AXIS, **change})


def test_density_counts_tokens_not_blocks() -> None:
    visited = torch.tensor([[[[True, False], [False, True]]]])
    mask = SparseBlocks(visited, AXIS, AXIS)
    assert mask.density() == mask.known_density() == pytest.approx((16 * 16 + 4 * 4) / 400)
    assert mask.density() == pytest.approx(float(mask.dense().float().mean()))
    assert SparseBlocks(visited, AXIS, AXIS, share=0.25).density() == 0.25
    for name in ("per sample and head", "segments"):
        assert MASKS[name].density() == pytest.approx(float(MASKS[name].dense().float().mean()))


def test_on_a_gpu_only_a_share_that_was_given_is_known() -> None:
    visited = torch.ones(1, 1, 2, 2, dtype=torch.bool, device="meta")  # any device but the CPU
    assert SparseBlocks(visited, AXIS, AXIS).known_density() is None
    assert SparseBlocks(visited, AXIS, AXIS, share=0.5).known_density() == 0.5


@pytest.mark.parametrize("by_keys", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_the_lists_cover_the_mask(name: str, by_keys: bool) -> None:
    mask = MASKS[name]
    lists = block_lists(mask, by_keys)
    planes = (mask.visited.shape[0], mask.visited.shape[1])
    walked, own = (mask.query_axis, mask.key_axis) if by_keys else (mask.key_axis, mask.query_axis)
    assert lists.full_start.shape == (*planes, own.blocks)
    assert lists.strides == (own.blocks * planes[1] if planes[0] > 1 else 0, own.blocks if planes[1] > 1 else 0)
    # Every block as tokens, (planes, query blocks, key blocks, query slots, key slots), false where there is none.
    allowed = mask.dense().expand(mask.batch, *mask.dense().shape[1:])
    tiles = mask.key_axis.cut(mask.query_axis.cut(allowed.float()).flatten(2, 3).transpose(2, 3)).flatten(2, 3)
    tiles = tiles.unflatten(3, (mask.query_axis.blocks, -1)).unflatten(2, (mask.key_axis.blocks, -1)).bool()
    tiles = tiles.permute(0, 1, 2, 4, 3, 5) if by_keys else tiles.permute(0, 1, 4, 2, 5, 3)
    missing = (walked.slots()[1].logical_not().any(dim=-1)).tolist()
    for b in range(planes[0]):
        for h in range(planes[1]):
            samples = tiles[:, h] if planes[0] == 1 else tiles[b : b + 1, h]
            for row in range(lists.rows):
                found = []
                for start, count in ((lists.full_start, lists.full_count), (lists.partial_start, lists.partial_count)):
                    first = int(start[b, h, row])
                    found.append(lists.col_idx[first : first + int(count[b, h, row])].tolist())
                    assert found[-1] == sorted(set(found[-1]))
                full, partial = found
                assert not set(full) & set(partial)
                assert {c for c in range(walked.blocks) if samples[:, row, c].any()} <= {*full, *partial}
                visited = mask.visited[b, h].T if by_keys else mask.visited[b, h]
                assert all(visited[row, c] for c in (*full, *partial))
                exists = own.slots()[1][row]
                for c in full:  # nothing to mask but what the row's own tile lacks
                    assert not missing[c]
                    assert samples[:, row, c][:, exists].all()


def test_blocks_whose_keys_are_all_hidden_are_not_visited() -> None:
    mask = SparseBlocks.everything(AXIS, BlockAxis((48,), 16))
    mask = mask.hide_keys(torch.arange(48)[None] >= torch.tensor([[32], [20]]))
    lists = block_lists(mask)
    assert lists.full_count.tolist() == [[[1, 1]]]
    assert lists.partial_count.tolist() == [[[1, 1]]]
    assert lists.col_idx.view(2, 3)[:, :2].tolist() == [[0, 1], [0, 1]]


def test_hiding_twice_hides_both() -> None:
    first, second = torch.arange(53)[None] < 3, torch.arange(53)[None] > 40
    mask = random_blocks(70, 53).hide_keys(first).hide_keys(second)
    assert torch.equal(mask.dense(), random_blocks(70, 53).hide_keys(first | second).dense())
    with pytest.raises(ValueError, match="must be bool"):
        mask.hide_keys(torch.zeros(1, 52, dtype=torch.bool))


@pytest.mark.parametrize("axis", [BlockAxis((80,), 16), BlockAxis((75,), 16), BlockAxis((23, 52), 16)])
def test_a_rule_gives_the_mask_that_it_says(axis: BlockAxis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnctrl.kernels.blocks_rule.PAIRS", 700)  # a few blocks at a time
    mask = blocks_from_rule(lambda b, h, q, k: (q - k).abs() <= 20, axis, axis)
    place = torch.arange(axis.tokens)
    assert torch.equal(mask.dense()[0, 0], (place[:, None] - place).abs() <= 20)
    assert mask.patterns is not None
    assert len(mask.patterns) == len(mask.patterns.flatten(1).unique(dim=0))
    if axis.tokens == 80:  # one for each distance of one block, or of two, either side; and the full one
        assert len(mask.patterns) == 5
        assert not mask.visited[0, 0, 0, 3]


def test_a_rule_is_asked_about_candidates_alone_per_sample_and_head() -> None:
    candidates = torch.rand(2, 2, 2, 2, generator=torch.Generator().manual_seed(0)) < 0.6
    mask = blocks_from_rule(lambda b, h, q, k: (q + b) % 2 == (k + h) % 2, AXIS, AXIS, candidates=candidates)
    place = torch.arange(20)
    for b in range(2):
        for h in range(2):
            wanted = (place[:, None] + b) % 2 == (place + h) % 2
            wanted &= candidates[b, h].repeat_interleave(16, 0).repeat_interleave(16, 1)[:20, :20]
            assert torch.equal(mask.dense()[b, h], wanted)


def test_a_rule_that_leaves_whole_blocks_makes_no_patterns() -> None:
    mask = blocks_from_rule(lambda b, h, q, k: q // 16 == k // 16, AXIS, AXIS)
    assert mask.patterns is None
    assert mask.visited[0, 0].tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize("name", ["random", "per sample and head", "band", "hidden keys", "sizes that differ"])
def test_flex_there_and_back(name: str) -> None:
    mask = MASKS[name]
    flex = to_flex(mask)
    assert flex.seq_lengths == (mask.queries, mask.keys)
    back = from_flex(flex)
    assert torch.equal(back.dense(), mask.dense())
    assert (back.query_axis, back.key_axis) == (mask.query_axis, mask.key_axis)


def test_whole_blocks_cost_flexattention_no_rule() -> None:
    flex = to_flex(random_blocks(64, 48))
    assert not flex.kv_num_blocks.any()
    assert torch.equal(flex.to_dense().bool(), random_blocks(64, 48).visited)


def test_flexattentions_own_masks_become_ours() -> None:
    flex = create_block_mask(lambda b, h, q, k: q >= k, None, None, 50, 40, device="cpu", BLOCK_SIZE=16)
    assert torch.equal(from_flex(flex).dense()[0, 0], torch.ones(50, 40, dtype=torch.bool).tril())


def test_segments_are_not_for_flexattention() -> None:
    with pytest.raises(ValueError, match=r"keys have segments of \(21, 40\)"):
        to_flex(random_blocks(70, (21, 40)))


def test_another_device_gets_the_same_mask() -> None:
    mask = band(37, 37, 5).hide_keys(torch.zeros(1, 37, dtype=torch.bool))
    assert mask.to("cpu") is mask
    moved = mask.to("meta")
    assert all(getattr(moved, name).device.type == "meta" for name in ("visited", "hidden", "pattern", "patterns"))
