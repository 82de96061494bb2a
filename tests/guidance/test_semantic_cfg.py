"""S-CFG against its card."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnctrl as ac
from attnctrl.controls.guidance.semantic_cfg import POWERS, foreground, propagated, region_rates
from tests import tiny
from tests.methods import self_map
from tests.probes import Guide
from tests.transformers import FAMILIES, draw


@pytest.mark.parametrize("variant", POWERS)
def test_maps_are_carried_by_the_powers_of_self_attention(variant: str) -> None:
    generator = torch.Generator().manual_seed(0)
    own = torch.rand(4, 4, generator=generator).softmax(dim=-1)
    cross = torch.rand(1, 4, 3, generator=generator).softmax(dim=-1)
    s2 = own @ own
    mixed = (own + 3 * s2) / 4 if variant == "code" else (own + s2 + own @ s2 + s2 @ s2) / 4
    found = propagated(cross, self_map(own, (2, 2)), POWERS[variant])
    torch.testing.assert_close(found, mixed @ cross)
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(1, 4))


def test_the_rates_of_two_halves() -> None:
    norm = torch.tensor([[1.0, 1.0, 2.0, 2.0]])
    regions, inside = torch.tensor([[5, 5, 7, 7]]), torch.tensor([[True, True, False, False]])
    torch.testing.assert_close(region_rates(norm, regions, inside, 0.8, 3.0), torch.tensor([[1.0, 1.0, 0.8, 0.8]]))
    torch.testing.assert_close(region_rates(norm, regions, inside, 0.1, 3.0), torch.tensor([[1.0, 1.0, 0.5, 0.5]]))
    # 15 over a scale of 25 wins over the lower bound.
    torch.testing.assert_close(region_rates(norm, regions, inside, 0.8, 0.6), torch.full((1, 4), 0.6))
    even = region_rates(torch.full((1, 4), 3.0), regions, inside, 0.8, 3.0)
    torch.testing.assert_close(even, torch.ones(1, 4))


def test_the_foreground_is_where_the_first_token_is_not_the_largest() -> None:
    maps = torch.tensor([[[0.9, 0.1], [0.05, 0.4], [0.05, 0.5]]])
    assert foreground(maps).tolist() == [[False, True]]
    assert foreground(maps[:, :1].repeat(1, 3, 1) * torch.tensor([[[1.0], [0.0], [0.0]]])).all()


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl])
def test_pixels_are_guided_by_their_regions_scale(make: Any) -> None:
    """What it adds is along cond - uncond, by one factor per pixel within the bounds."""
    pipe, got = make("euler"), []
    ends = [Guide(make=lambda p: (got.append(p), p.combined)[1]) for _ in range(2)]
    with ac.control(pipe, ends[0], ac.SemanticCFG(), ends[1]) as run:
        tiny.draw(pipe, steps=1, size=(32, 48))
    first, last = got
    apart = first.own - first.uncond
    factor = ((last.combined - first.uncond) * apart).sum(dim=1) / (apart**2).sum(dim=1) / first.scale
    torch.testing.assert_close(
        last.combined, first.uncond + first.scale * factor[:, None] * apart, atol=1e-4, rtol=1e-4
    )
    assert factor.min() > 0.8 - 1e-3
    assert factor.max() < 3.0 + 1e-3
    assert factor.max() - factor.min() > 1e-3
    assert {row.calls for row in run.report.rows.values() if row.point == "guide"} == {1}


def test_without_classifier_free_guidance_it_says_so() -> None:
    pipe = tiny.sd()
    with (
        pytest.raises(ac.ControlError, match="scales classifier-free guidance, which is off"),
        ac.control(pipe, ac.SemanticCFG()),
    ):
        tiny.draw(pipe, guidance_scale=1.0)


# FLUX.2 is guided by an input of the model, not by two predictions.
@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "flux2"])
def test_every_family(name: str) -> None:
    family = FAMILIES[name]
    pipe = family.make()
    stock = draw(pipe, family, steps=2)
    with ac.control(pipe, ac.SemanticCFG(low=0.0, high=100.0, ceiling=1000.0)):
        drawn = draw(pipe, family, steps=2)
    assert torch.isfinite(drawn).all()
    assert not torch.allclose(drawn, stock, atol=1e-6)


def test_all_three_together() -> None:
    pipe = tiny.sd("dpm")
    stock = tiny.draw(pipe)
    with ac.control(pipe, ac.SelfAttentionGuidance(), ac.SoftPAG(), ac.SemanticCFG()) as run:
        drawn = tiny.draw(pipe)
    assert torch.isfinite(drawn).all()
    assert not torch.allclose(drawn, stock, atol=1e-3)
    assert {row.control for row in run.report.rows.values()} == {"SelfAttentionGuidance", "SoftPAG", "SemanticCFG"}
