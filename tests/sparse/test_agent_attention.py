"""Agent attention and the merging of tokens: by hand, their limits, the schedule, and on UNets."""

from __future__ import annotations

import pytest
import torch

import attnctrl as ac
from attnctrl.controls.sparse.agent_attention import agent_attention
from attnctrl.controls.sparse.merging import destinations, merged
from attnctrl.sites import Call, Grid
from tests import tiny
from tests.kernels.masks import tensors
from tests.methods import step
from tests.sparse.calls import a_call, attended, dense

PICTURE = (1, 10, 14)


def agents(**params: float) -> ac.AgentAttention:
    return ac.AgentAttention(fall_back=False, **params)  # type: ignore[arg-type]


def early(**more: object) -> Call:
    return a_call(PICTURE, at=step(3), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(("grid", "cells"), [((1, 8, 8), 4), ((1, 10, 14), 12), ((3, 4, 4), 3), ((1, 3, 2), 1)])
def test_one_token_of_each_cell(grid: Grid, cells: int) -> None:
    _, height, width = grid
    found = set()
    for seed in range(20):
        into = destinations(grid, 4, torch.Generator().manual_seed(seed))
        frame, row, column = into // (height * width), into // width % height, into % width
        homes = list(zip(frame.tolist(), (row // 4).tolist(), (column // 4).tolist(), strict=True))
        assert len(set(homes)) == len(homes) == cells
        found |= set(into.tolist())
    assert len(found) > cells  # not always the same ones


def test_merging_by_hand() -> None:
    # Token 0 and 3 take others up; 1 is most like 0, 4 most like 3, 2 is like neither.
    features = torch.tensor([[1.0, 0.0], [0.99, 0.1], [-1.0, -1.0], [0.0, 1.0], [0.2, 0.9]])[None]
    one = merged(features, torch.tensor([0, 3]), 2)
    assert one.kept == 3
    assert one.group.tolist() == [[0, 0, 1, 2, 2]]
    values = torch.tensor([2.0, 4.0, 7.0, 1.0, 5.0]).view(1, 1, 5, 1)
    assert one.mean(values).flatten().tolist() == [3.0, 7.0, 3.0]
    assert one.spread(one.mean(values)).flatten().tolist() == [3.0, 3.0, 7.0, 3.0, 3.0]
    # At most all others go.
    assert merged(features, torch.tensor([0, 3]), 99).kept == 2
    none = merged(features, torch.tensor([0, 3]), 0)
    assert torch.equal(none.mean(values), values)


def test_pictures_of_a_batch_merge_on_their_own() -> None:
    features = torch.randn(3, 40, 8, generator=torch.Generator().manual_seed(0))
    into = torch.arange(0, 40, 5)
    both = merged(features, into, 12)
    for picture in range(3):
        alone = merged(features[picture : picture + 1], into, 12)
        assert torch.equal(alone.group[0], both.group[picture])


def test_constant_values_come_back_with_the_shortcut() -> None:
    query, key, value = tensors(1, 2, 30, 30, 8)
    value = torch.full_like(value, 3.0)
    found = agent_attention(query, query[:, :, :5], key, value, 0.35, 0.3, 0.075)
    torch.testing.assert_close(found, torch.full_like(found, 3.0 * 1.075))


def test_with_all_tokens_as_sharp_agents_it_is_full_attention() -> None:
    """softmax(q q^T * much) is the identity where every token is most like itself."""
    query, key, value = tensors(1, 2, 30, 30, 8)
    query = query / query.norm(dim=-1, keepdim=True)
    scale = 1000.0  # to the power 1, of the products of unit vectors
    found = agent_attention(query, query, key, value, scale, 1.0, 0.075)
    expected = (query @ key.transpose(-1, -2) * scale).softmax(dim=-1) @ value + 0.075 * value
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_formula() -> None:
    query, key, value = tensors(1, 2, 30, 20, 8)
    few = query[:, :, :4]
    gathered = (few @ key.transpose(-1, -2) * 8**-0.5).softmax(dim=-1) @ value
    expected = (query[:, :, :20] @ few.transpose(-1, -2) * 8**-0.15).softmax(dim=-1) @ gathered + 0.075 * value
    found = agent_attention(query[:, :, :20], few, key, value, 8**-0.5, 0.3, 0.075)
    torch.testing.assert_close(found, expected)


def test_agents_early_and_merging_alone_later() -> None:
    control = agents()
    _, report = attended(control, early())
    (first,) = report.visits.values()
    # 140 tokens: 84 left, and one agent in each of 12 cells.
    assert (first.form, first.share) == ("agents", 2 * 12 * 84 / 140**2)
    _, report = attended(control, a_call(PICTURE, at=step(40)))
    (late,) = report.visits.values()
    assert (late.form, late.share) == ("merged tokens", 84**2 / 140**2)
    # Agents that are no fewer than half of the tokens are not used.
    _, report = attended(agents(agent_ratio=0.5), early())
    assert next(iter(report.visits.values())).form == "merged tokens"


def test_without_merging_or_agents_it_is_full_attention() -> None:
    call = early(batch=2)
    output, _ = attended(agents(ratio=0.0, agent_ratio=0.3), call)
    torch.testing.assert_close(output, dense(call), atol=1e-6, rtol=1e-5)
    assert ac.AgentAttention(ratio=0.0, agents_until=0.0).idle


def test_both_branches_draw_alike_and_steps_do_not() -> None:
    def drawn(branch: str = "cond", index: int = 3) -> torch.Tensor:
        output, _ = attended(agents(), a_call(PICTURE, at=step(index), branch=branch))
        assert output is not None
        return output

    assert torch.equal(drawn(), drawn("uncond"))
    assert not torch.allclose(drawn(), drawn(index=4))


def test_few_tokens_are_left_full() -> None:
    output, report = attended(ac.AgentAttention(), early())
    assert output is None
    assert next(iter(report.visits.values())).why == "fewer than 4096 tokens"


def test_text_among_the_tokens_is_refused() -> None:
    with pytest.raises(ac.ControlError, match=r"AgentAttention merges the tokens of self-attention without a mask"):
        attended(agents(), a_call(PICTURE, before=3))


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl])
def test_on_unets_it_acts_at_the_finest_layers(make: object) -> None:
    pipe = make()  # type: ignore[operator]
    stock = tiny.draw(pipe, steps=4)
    with ac.control(pipe, agents(), record=False) as run:
        drawn = tiny.draw(pipe, steps=4)
    assert torch.isfinite(drawn).all()
    assert not torch.allclose(drawn, stock, atol=1e-4)
    sites = {site.name: site for site in run.sampling.sites}  # type: ignore[union-attr]
    acted = {site for site, *_ in run.report.visits}
    finest = min(site.depth for site in sites.values())
    assert acted == {name for name, site in sites.items() if site.kind == "self" and site.depth == finest}
    assert {branch for *_, branch in run.report.visits} == {"cond", "uncond"}
    forms = {step: visit.form for (_, step, _), visit in run.report.visits.items()}
    assert forms == {0: "agents", 1: "agents", 2: "merged tokens", 3: "merged tokens"}
