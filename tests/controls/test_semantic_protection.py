"""Semantic protection against its card."""

from __future__ import annotations

import torch

import attnctrl as ac
from attnctrl.controls.fidelity.semantic_protection import hidden_words, protected, seeds, unit
from attnctrl.stepmaps import CrossMap, StepMaps
from tests import tiny
from tests.methods import SITES, sampling, self_map


def test_seeds_leave_out_the_border() -> None:
    maps = torch.zeros(1, 1, 16)
    maps[0, 0, 0], maps[0, 0, 5], maps[0, 0, 6] = 5.0, 3.0, 1.0
    assert seeds(maps, (1, 4, 4), 0.9).nonzero()[:, -1].tolist() == [5]
    assert unit(torch.full((3,), 2.0)).tolist() == [0, 0, 0]


def test_regions_of_two_concepts_are_disjoint() -> None:
    spread = torch.tensor([[[1.0, 0.8, 0.3, 0.0], [0.0, 0.3, 0.8, 1.0]]])
    inside = protected(spread, torch.ones(1, 2, dtype=torch.bool), 0.1)
    assert inside[0].int().tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]
    # A concept alone, and the padding of prompts with fewer, protect nothing from anything.
    lone = protected(spread, torch.tensor([[True, False]]), 0.1)
    assert not lone[0, 1].any()


def test_inside_a_concept_the_words_of_the_others_are_hidden() -> None:
    tokens = torch.tensor([[[0, 1, 1, 0, 0], [0, 0, 0, 0, 1]]]).bool()
    inside = torch.tensor([[[1, 0, 0], [0, 1, 0]]]).bool()
    assert hidden_words(tokens, inside)[0].int().tolist() == [[0, 0, 0, 0, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]


def test_where_concepts_overlap_the_words_of_both_are_seen() -> None:
    tokens = torch.eye(3, 4).bool()[None]
    inside = torch.tensor([[[1, 1, 0], [0, 1, 0], [0, 0, 1]]]).bool()
    assert hidden_words(tokens, inside)[0].int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 0], [1, 1, 0, 0]]


def test_blocks_of_self_attention_become_the_regions() -> None:
    """Two halves that attend to themselves alone, a seed in each: the regions are the halves."""
    control = ac.SemanticProtection()
    state = control.begin(sampling("a red cat and a bird", grid=(4, 4)))
    left = torch.tensor([True, True, False, False]).repeat(4)
    attention = torch.where(left[:, None] == left[None], 0.125 - 1e-9, 1e-9)
    probs = torch.full((1, 16, 24), 0.01)
    probs[0, 5, 3] = probs[0, 6, 6] = 0.5  # cat at the left, bird at the right, both off the border
    maps = StepMaps({"c": CrossMap(SITES[1], (1, 4, 4), probs)}, {"s": self_map(attention, (4, 4))})
    inside, grid = control._regions(maps, state)
    assert grid == (1, 4, 4)
    assert torch.equal(inside[0, 0], left)
    assert torch.equal(inside[0, 1], ~left)
    assert state.tokens[0].int().sum(dim=-1).tolist() == [2, 1]  # "red cat", "bird"


def test_one_concept_changes_nothing() -> None:
    pipe = tiny.sd()
    stock = tiny.draw(pipe, "a red cat")
    with ac.control(pipe, ac.SemanticProtection(near=1.0)):
        torch.testing.assert_close(tiny.draw(pipe, "a red cat"), stock, atol=1e-5, rtol=1e-5)
