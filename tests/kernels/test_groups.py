"""Token groups as masks: bits, checks, combination, and the lists of tiles made from them."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnctrl.kernels import TokenGroups
from attnctrl.kernels.tiles import tile_list, tile_maps

from .masks import random_groups


def bits(*values: int) -> torch.Tensor:
    return torch.tensor([values])


def test_a_query_sees_the_keys_that_it_shares_a_group_with() -> None:
    groups = TokenGroups(bits(0b01, 0b10, 0b11, 0), bits(0b01, 0b10, 0))
    assert groups.dense()[0, 0].int().tolist() == [[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert (groups.batch, groups.queries, groups.keys) == (1, 4, 3)


def test_rules_may_hold_one_way() -> None:
    # Two tokens: the first sees both, the second itself alone.
    groups = TokenGroups(bits(0b11, 0b10), bits(0b01, 0b10))
    assert groups.dense()[0, 0].int().tolist() == [[1, 1], [0, 1]]


def test_padding_is_hidden_per_sample() -> None:
    groups = TokenGroups.everything(2, 3).hide_keys(torch.tensor([[False, False, True], [False, True, True]]))
    assert groups.batch == 2
    assert groups.dense()[:, 0, 0].int().tolist() == [[1, 1, 0], [1, 0, 0]]


def test_padding_hides_its_keys_and_is_read_once() -> None:
    groups, padding = (
        TokenGroups.everything(2, 3),
        torch.tensor([[True, True, False], [True, False, False]])[:, None, None],
    )
    found = groups.padded(padding)
    assert found.dense()[:, 0, 0].int().tolist() == [[1, 1, 0], [1, 0, 0]]
    # Layers are given views of one tensor.
    assert groups.padded(padding[:2]) is found
    assert groups.padded(padding[:1]) is not found
    assert groups.padded(padding.clone()) is not found


def test_padding_that_was_written_to_is_another() -> None:
    groups, padding = TokenGroups.everything(1, 3), torch.tensor([[[[True, True, False]]]])
    assert groups.padded(padding).dense()[0, 0, 0].tolist() == [True, True, False]
    padding[..., 0] = False
    assert groups.padded(padding).dense()[0, 0, 0].tolist() == [False, True, False]
    with torch.inference_mode():  # where writing is not counted
        padding = torch.tensor([[[[True, True, False]]]])
        groups.padded(padding)
        padding[..., 0] = False
        assert groups.padded(padding).dense()[0, 0, 0].tolist() == [False, True, False]


@pytest.mark.parametrize("hiding", [float("-inf"), -10000.0, torch.finfo(torch.float16).min])
def test_additive_padding_hides_or_is_refused(hiding: float) -> None:
    groups = TokenGroups.everything(1, 3)
    additive = torch.tensor([0.0, hiding, 0.0]).expand(1, 1, 1, 3)
    assert groups.padded(additive).dense()[0, 0, 0].tolist() == [True, False, True]
    with pytest.raises(ValueError, match=r"adds other numbers than 0 and -1000 or less"):
        groups.padded(additive + torch.tensor([0.0, 0.0, 0.5]))


def test_two_masks_are_combined_once_while_both_live() -> None:
    one, other = random_groups(5, 6), random_groups(5, 6, seed=1)
    both = one & other
    assert one & other is both
    assert one & random_groups(5, 6, seed=2) is not both
    seen, kept = weakref.ref(other), one.memo["and"]
    del other
    assert seen() is None
    assert len(kept) == 0


def test_sixty_four_groups_fit() -> None:
    groups = TokenGroups.from_members(torch.eye(64, dtype=torch.bool)[None])
    assert torch.equal(groups.dense()[0, 0], torch.eye(64, dtype=torch.bool))


def test_some_keys_are_the_columns_of_all() -> None:
    groups = random_groups(7, 9, batch=(2, 1))
    chosen = torch.tensor([4, 0])
    assert torch.equal(groups.visible(chosen), groups.dense()[..., chosen])


@pytest.mark.parametrize(
    ("query_bits", "key_bits", "sentence"),
    [
        (torch.zeros(1, 3), bits(1), "int64"),
        (torch.zeros(3, dtype=torch.int64), bits(1), r"must be \(batch or 1, tokens\)"),
        (bits(1), torch.zeros(1, 0, dtype=torch.int64), "not empty"),
        (bits(1).expand(2, 1), bits(1).expand(3, 1), r"batches of \[2, 3\]"),
    ],
)
def test_bits_that_make_no_mask_are_refused(query_bits: torch.Tensor, key_bits: torch.Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        TokenGroups(query_bits, key_bits)


def test_members_that_make_no_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 64"):
        TokenGroups.from_members(torch.zeros(1, 2, 65, dtype=torch.bool))
    with pytest.raises(ValueError, match="bool"):
        TokenGroups.from_members(torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match="must be the same"):
        TokenGroups.from_members(torch.zeros(1, 2, 3, dtype=torch.bool), torch.zeros(1, 2, 4, dtype=torch.bool))


@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 20),
    st.integers(1, 20),
    st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2)]),
    st.integers(0, 1000),
)
@settings(max_examples=40)
def test_both_masks_together_allow_what_each_allows(
    first: int, second: int, queries: int, keys: int, batch: tuple[int, int], seed: int
) -> None:
    one = random_groups(queries, keys, first, 0.3, batch, seed)
    two = random_groups(queries, keys, second, 0.3, (1, 1), seed + 1)
    assert torch.equal((one & two).dense(), (one.dense() & two.dense()).expand((one & two).dense().shape))


def test_many_groups_combine_where_there_are_few_kinds_of_tokens() -> None:
    # 12 x 12 groups in use: too many for the product, while there are at most 50 kinds of queries, or of keys.
    for queries, keys in ((50, 200), (200, 50)):
        one, two = (random_groups(queries, keys, 12, 0.3, seed=seed) for seed in (1, 2))
        assert torch.equal((one & two).dense(), one.dense() & two.dense())


def test_masks_that_cannot_be_combined_say_why() -> None:
    with pytest.raises(ValueError, match="cannot be combined"):
        TokenGroups.everything(2, 3) & TokenGroups.everything(3, 3)
    one, two = (random_groups(200, 200, 12, 0.3, seed=seed) for seed in (1, 2))
    with pytest.raises(ValueError, match="12 x 12 groups, 200 kinds of queries"):
        one & two


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 0.6), st.sampled_from([(1, 1), (2, 1)]), st.booleans())
@settings(max_examples=40)
def test_the_lists_of_tiles_cover_the_mask(
    queries: int, keys: int, density: float, batch: tuple[int, int], by_keys: bool
) -> None:
    groups = random_groups(queries, keys, 2, density, batch)
    found = tile_list(groups, 8, 4, by_keys)
    rows, columns = -(-queries // 8), -(-keys // 4)
    padded = torch.zeros(groups.batch, rows * 8, columns * 4, dtype=torch.bool)
    padded[:, :queries, :keys] = groups.dense()[:, 0]
    tiles = padded.view(groups.batch, rows, 8, columns, 4).permute(0, 1, 3, 2, 4).flatten(3)
    if by_keys:
        tiles = tiles.transpose(1, 2)
    assert found.rows == tiles.shape[1]
    assert found.batch_stride == (found.rows if groups.batch == 2 else 0)
    for sample in range(groups.batch):
        for row in range(found.rows):
            lists = []
            for start, count in ((found.full_start, found.full_count), (found.partial_start, found.partial_count)):
                first = int(start[sample, row])
                lists.append(found.col_idx[first : first + int(count[sample, row])].tolist())
            full, partial = lists
            assert full == sorted(full)
            assert partial == sorted(partial)
            assert not set(full) & set(partial)
            assert all(tiles[sample, row, column].all() for column in full)
            # Every tile with a visible pair is visited; no group spans a tile that none has.
            visible = {c for c in range(tiles.shape[2]) if tiles[sample, row, c].any()}
            assert visible == {*full, *partial}


def test_a_tile_with_a_group_in_common_is_full_unless_it_ends_beyond_the_tokens() -> None:
    visited, full = tile_maps(TokenGroups.everything(20, 12), 8, 8)
    assert visited.all()
    assert full[0].int().tolist() == [[1, 0], [1, 0], [0, 0]]
