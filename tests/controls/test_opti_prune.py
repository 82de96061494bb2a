"""OptiPrune against its card; its search is InitNO's, tested there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnctrl as ac
from attnctrl.controls.fidelity.opti_prune import patches, pruned
from attnctrl.sites import Call
from tests import tiny
from tests.probes import REGIONS, Inputs
from tests.spies import watched

STILL = torch.zeros(16)
GRID = (1, 4, 4)


def test_patches() -> None:
    assert patches((1, 2, 4), 2).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert patches((2, 1, 3), 2).tolist() == [[0, 1, -1, -1], [2, -1, -1, -1], [3, 4, -1, -1], [5, -1, -1, -1]]
    assert patches((1, 2, 2), 1).tolist() == [[0], [1], [2], [3]]


def test_the_choice_by_hand() -> None:
    """Two patches of three tokens: the base is the one most like the others; the likest of the rest go first."""
    angles = torch.tensor([0.0, 0.1, 0.3, 2.0, 2.4, 2.5])  # base 1 (0.1 between) and base 4
    features = torch.stack([angles.cos(), angles.sin()], dim=-1)[None]
    cells = torch.tensor([[0, 1, 2], [3, 4, 5]])
    for count, gone in ((0, []), (1, [5]), (2, [0, 5]), (3, [0, 2, 5]), (4, [0, 2, 3, 5]), (9, [0, 2, 3, 5])):
        kept, stands_for = pruned(features, cells, count, torch.zeros(6))
        expected = [t for t in range(6) if t not in gone]
        if count == 1:  # tokens 0 and 5 are equally like their bases, up to rounding
            assert kept.tolist()[0] in ([1, 2, 3, 4, 5], expected)
            continue
        assert kept.tolist() == [expected]
        base = {0: 1, 2: 1, 3: 4, 5: 4}
        assert kept[0][stands_for[0]].tolist() == [base[t] if t in gone else t for t in range(6)]


def test_borders_and_nothing_to_prune() -> None:
    features = torch.rand(2, 15, 4, generator=torch.Generator().manual_seed(0))
    kept, stands_for = pruned(features, patches((1, 3, 5), 2), 99, torch.zeros(15))
    assert kept.shape == (2, 6)  # one base in each of 2 x 3 patches
    assert stands_for.max() == 5
    for number, cell in enumerate(patches((1, 3, 5), 2)):
        inside = cell[cell >= 0]
        assert all(len(set(stands_for[b, inside].tolist())) == 1 for b in range(2)), number
    kept, stands_for = pruned(features, patches((1, 3, 5), 1), 99, torch.zeros(15))
    assert torch.equal(kept, torch.arange(15).expand(2, -1))
    assert torch.equal(stands_for, kept)


def test_jitter_changes_the_base() -> None:
    features = torch.rand(1, 16, 4, generator=torch.Generator().manual_seed(0))
    jitter = torch.zeros(16)
    first, _ = pruned(features, patches(GRID, 2), 12, jitter)
    jitter[next(t for t in range(16) if t not in first[0].tolist())] = 10.0
    second, _ = pruned(features, patches(GRID, 2), 12, jitter)
    assert not torch.equal(first, second)


def prune(**params: Any) -> ac.Control:
    return ac.OptiPrune(("cat", "dog"), rounds=0, **params)


def test_equal_tokens_are_pruned_without_a_trace() -> None:
    """With every token the same, pruned attention equals the whole, at any ratio."""
    pipe = tiny.sd()

    def level(call: Call) -> Call:
        same = {n: getattr(call, n)[:, :, :1].expand_as(getattr(call, n)) for n in ("query", "key", "value")}
        return call.change(**same)

    flat = Inputs(edit=level, where=ac.Where(kinds=("cross",)))  # any attention point, so that the path is ours
    drawn = []
    for ratio in (0.1, 0.7):
        with ac.control(pipe, prune(ratio=ratio), flat) as run:
            drawn.append(tiny.draw(pipe, steps=1))
        assert {row.point for row in run.report.rows.values()} == {"inputs", "output"} | {"noise"}
    assert not torch.equal(*drawn)
    key = torch.ones(1, 2, 16, 3)
    kept, stands_for = pruned(key.transpose(1, 2).flatten(2), patches(GRID, 2), 8, STILL)
    output = torch.rand(1, 1, 1, 3).expand(1, 2, len(kept[0]), 3)
    restored = output.gather(2, stands_for[:, None, :, None].expand(-1, 2, -1, 3))
    assert torch.equal(restored, output[:, :, :1].expand(1, 2, 16, 3))


def test_it_prunes_the_finest_self_attention_in_both_branches_alike() -> None:
    pipe, seen = tiny.sd(), []
    control = prune(ratio=0.5)

    class Spy(ac.OptiPrune):
        def output(self, output: torch.Tensor, call: Call, state: Any) -> torch.Tensor:
            whole = super().output(output, call, state)
            seen.append((call.site.name, call.step.index, call.branch, output.shape[2], whole.shape[2]))
            assert state.maps[call.site.name][0] == call.step.index
            return whole

    with ac.control(pipe, Spy(("cat", "dog"), rounds=0, ratio=0.5)):
        drawn = tiny.draw(pipe, steps=2)
    assert {(pruned, whole) for *_, pruned, whole in seen} == {(128, 256)}
    assert {branch for _, _, branch, _, _ in seen} == {"cond", "uncond"}
    with ac.control(pipe, control):
        assert torch.equal(tiny.draw(pipe, steps=2), drawn)  # the random choice repeats
    with ac.control(pipe, prune(ratio=0.5, seed=1)):
        assert not torch.equal(tiny.draw(pipe, steps=2), drawn)


def test_the_branches_share_their_choice() -> None:
    """Of the same text they are alike to the last token."""
    pipe = tiny.sd()
    with ac.control(pipe, prune(ratio=0.5)), watched(pipe) as seen:
        tiny.draw(pipe, steps=1, negative_prompt=tiny.PROMPT)
    halves = seen.predictions[0].chunk(2)
    torch.testing.assert_close(halves[0], halves[1])


def test_ratio_zero_has_no_attention_point() -> None:
    control = ac.OptiPrune(("cat",), ratio=0.0)
    assert control.points() == ("noise",)
    assert ac.OptiPrune(("cat",)).points() == ("inputs", "output", "noise")


def test_the_search_reads_whole_maps() -> None:
    pipe = tiny.sd()
    with ac.control(pipe, ac.OptiPrune(("cat", "dog"), rounds=1, iterations=2, ratio=0.5)):
        both = tiny.draw(pipe, steps=1)
    with ac.control(pipe, ac.OptiPrune(("cat", "dog"), rounds=1, iterations=2, ratio=0.0)):
        searched = tiny.draw(pipe, steps=1)
    assert not torch.equal(both, searched)
    assert torch.isfinite(both).all()


@pytest.mark.parametrize(
    "other",
    [ac.DenseDiffusion(REGIONS), ac.Refocus(REGIONS)],
)
def test_other_work_on_self_attention_is_refused(other: ac.Control) -> None:
    pipe = tiny.sd()
    with (
        pytest.raises(ac.ControlError, match=r"cannot work together: both work on self-attention, where OptiPrune"),
        ac.control(pipe, prune(), other),
    ):
        pytest.fail("the block was entered")
    with ac.control(pipe, ac.OptiPrune(("cat",), rounds=1, iterations=1, ratio=0.0), other):
        pass
