"""Regional prompting for joint attention against its card."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnctrl as ac
from attnctrl.controls.layout.regional_flux import base_groups, open_groups, strict_groups, with_background
from attnctrl.kernels import TokenGroups
from attnctrl.sites import Call
from tests import tiny
from tests.joint_models import (
    JOINT,
    assert_batch_is_the_single_ones,
    changed,
    first_outputs,
    latent_rows,
    matrix,
    on_joint_models,
    seen,
)
from tests.parts import Tiny
from tests.probes import REGIONS, Mask, Nudge
from tests.transformers import FAMILIES, draw

# The corners of a picture of 2 x 2: one each for cat and dog, the lower row is background.
CORNERS = (ac.Region("cat", box=(0.0, 0.0, 0.5, 0.5)), ac.Region("dog", box=(0.5, 0.0, 1.0, 0.5)))
LEFT = (ac.Region("cat", box=(0.0, 0.0, 0.5, 1.0)),)


def with_text(regions: Any, prompts: list[str] | None = None, background: str | list[str] = "") -> Any:
    prompts = prompts or ["a cat and a dog"]
    return with_background(regions, prompts, len(prompts), background)


def test_what_sees_what_by_hand() -> None:
    """Text of prompt, background, cat and dog, then the latents: cat, dog, and two of the background."""
    found = matrix(strict_groups, with_text(CORNERS), blocks=3)
    assert found[0].tolist() == seen("""
        p... cdbb
        .b.. ..bb
        ..c. c...
        ...d .d..
        ..c. c...
        ...d .d..
        .b.. ..bb
        .b.. ..bb
    """)


def test_overlapping_regions_see_each_other() -> None:
    """The upper left belongs to both, so it sees both texts and what both cover."""
    regions = (LEFT[0], ac.Region("dog", box=(0.0, 0.0, 1.0, 0.5)))
    found = matrix(strict_groups, with_text(regions), blocks=3)
    assert found[0, 4:].tolist() == seen("""
        ..cd lll.
        ...d ll..
        ..c. l.l.
        .b.. ...l
    """)


def test_the_base_and_the_layers_between_by_hand() -> None:
    assert matrix(base_groups, with_text(CORNERS), blocks=3)[0].tolist() == seen("""
        .... ....
        .... ....
        .... ....
        .... ....
        p... llll
        p... llll
        p... llll
        p... llll
    """)
    assert matrix(open_groups, with_text(CORNERS), blocks=3)[0].tolist() == seen("""
        p... llll
        .bcd llll
        .bcd llll
        .bcd llll
        .bcd llll
        .bcd llll
        .bcd llll
        .bcd llll
    """)


def test_a_prompt_without_regions_is_left_alone() -> None:
    prompts = ["a cat", "the bird"]
    regions = with_text((LEFT, ()), prompts)
    for make, expected in (
        (strict_groups, [True, False, False, True, True, True, True]),
        (open_groups, [True, False, False, True, True, True, True]),
        (base_groups, [False] * 7),
    ):
        found = matrix(make, regions, prompts, blocks=2)
        assert found[1, 3:].tolist() == [expected] * 4
        assert not found[1, 1:3].any()
    assert matrix(strict_groups, regions, prompts, blocks=2)[0, 3].tolist() == seen("..c l.l.")[0]


def test_the_background_reads_the_prompt_or_its_own_text() -> None:
    lists: Any = with_background((LEFT, ()), ["a cat", "the bird"], 2, "")
    assert [r.text for r in lists[0]] == ["a cat", "cat"]
    assert lists[1] == []
    lists = with_background(LEFT, None, 1, "the red bird")
    assert [r.text for r in lists[0]] == ["the red bird", "cat"]
    with pytest.raises(ac.ControlError, match=r"reads the prompt where it gets no background.*give background="):
        with_background(LEFT, None, 1, "")


@on_joint_models
def test_without_effect_it_is_the_stock_picture(family: Tiny) -> None:
    pipe = family.make()
    expected = draw(pipe, family)
    for idle in (ac.RegionalFlux(()), ac.RegionalFlux(LEFT, until=0.0), ac.RegionalFlux(LEFT, base_ratio=1.0)):
        with ac.control(pipe, idle):
            assert torch.equal(draw(pipe, family), expected)


@on_joint_models
def test_regions_are_isolated_in_the_strict_phase(family: Tiny) -> None:
    """One layer: another text of the cat reaches the cat's latents alone, other latents of the dog the dog's alone."""
    about = {"entity_tokens": 4, "base_ratio": 0.0}
    one = first_outputs(family, ac.RegionalFlux(LEFT, **about))
    moved = (ac.Region("cat", box=LEFT[0].box, prompt="bird"),)
    left = torch.zeros(family.grid[1:], dtype=torch.bool)
    left[:, : family.grid[2] // 2] = True
    assert torch.equal(changed(one, first_outputs(family, ac.RegionalFlux(moved, **about)), family)[0], left)
    ground = first_outputs(family, ac.RegionalFlux(LEFT, **about, background="the red bird"))
    assert torch.equal(changed(one, ground, family)[0], ~left)


@on_joint_models
def test_no_latent_reaches_another_region(family: Tiny) -> None:
    """Noise moved in the right half leaves the left half of the first layer as it is; with the base mixed in it does
    not."""
    pipe = family.make()
    torch.manual_seed(7)
    size = pipe_latents(pipe, family)
    other = size.clone()
    other[..., other.shape[-1] // 2 :] += 1.0
    left = torch.zeros(family.grid[1:], dtype=torch.bool)
    left[:, : family.grid[2] // 2] = True
    for ratio in (0.0, 0.1):
        about = ac.RegionalFlux(LEFT, entity_tokens=4, base_ratio=ratio)
        one, two = (first_outputs(family, _Both(about, start), "cond") for start in (size, other))
        apart = changed(one, two, family)[0]
        assert apart[~left].all()
        assert apart[left].any() == (ratio > 0)


def pipe_latents(pipe: Any, family: Tiny) -> torch.Tensor:
    """Noise in the form in which controls see it."""
    got: list[torch.Tensor] = []

    class Keep(ac.Control):
        def noise(self, noise: torch.Tensor, sampling: Any, state: Any) -> torch.Tensor:
            got.append(noise)
            return noise

    with ac.control(pipe, Keep()):
        draw(pipe, family, steps=1)
    return got[0]


class _Both(ac.RegionalFlux):
    """The control from a given start."""

    def __init__(self, control: ac.RegionalFlux, start: torch.Tensor) -> None:
        super().__init__(control.regions, entity_tokens=control.entity_tokens, base_ratio=control.base_ratio)
        object.__setattr__(self, "start", start)

    def noise(self, noise: torch.Tensor, sampling: Any, state: Any) -> torch.Tensor:
        return self.start


@on_joint_models
def test_the_base_is_mixed_in_by_its_share(family: Tiny) -> None:
    """In the first layer latents get (1 - ratio) * strict + ratio * stock."""
    strict, stock, mixed = (
        latent_rows(first_outputs(family, control), family)
        for control in (
            ac.RegionalFlux(LEFT, entity_tokens=4, base_ratio=0.0),
            Nudge(by=0.0),
            ac.RegionalFlux(LEFT, entity_tokens=4, base_ratio=0.25),
        )
    )
    torch.testing.assert_close(mixed, 0.75 * strict + 0.25 * stock, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(strict, stock, atol=1e-3)


@on_joint_models
def test_after_the_strict_phase_the_model_is_the_stock_one(family: Tiny) -> None:
    """From the second step on and in the unconditional branch, what latents get is what they get in stock runs."""
    pipe = family.make()
    with ac.control(pipe, ac.RegionalFlux(LEFT, entity_tokens=4, until=0.3)) as run:
        draw(pipe, family, steps=4)
    rows = {row.point: row.steps for row in run.report.rows.values()}
    assert rows["mask"] == {0, 1, 2, 3}
    late = ac.RegionalFlux(LEFT, entity_tokens=4, until=1e-9)
    for branch in ("cond", "uncond"):
        stock = latent_rows(first_outputs(family, Nudge(by=0.0), branch), family)
        if branch == "uncond":
            torch.testing.assert_close(
                latent_rows(first_outputs(family, late, branch), family), stock, atol=1e-5, rtol=1e-5
            )
        # An image-to-image run that begins after the strict phase: the whole prompt, no region.
        hidden = _After(LEFT, entity_tokens=4, until=1e-9)
        torch.testing.assert_close(
            latent_rows(first_outputs(family, hidden, branch), family), stock, atol=1e-5, rtol=1e-5
        )


class _After(ac.RegionalFlux):
    """The strict phase is over in the first step already."""

    def _strict(self, call: Any) -> bool:
        return False


@on_joint_models
def test_a_batch_gives_the_single_pictures(family: Tiny) -> None:
    """Two prompts with regions of their own, two pictures of each, on latents that are not square."""
    assert_batch_is_the_single_ones(family, lambda regions: ac.RegionalFlux(regions, entity_tokens=4))


@on_joint_models
def test_it_composes(family: Tiny) -> None:
    """Beside a control of the latents, and a mask by groups: from where text is hidden the picture changes again."""
    pipe = family.make()
    about = ac.RegionalFlux(LEFT, entity_tokens=4)
    with ac.control(pipe, about):
        alone = draw(pipe, family, steps=2)
    blind = Mask(make=lambda call: TokenGroups.from_members(blind_half(call)), where=JOINT)
    for other in (Nudge(by=0.3), blind):
        with ac.control(pipe, other, about) as run:
            together = draw(pipe, family, steps=2)
        assert torch.isfinite(together).all()
        assert not torch.allclose(together, alone, atol=1e-3)
        assert {row.control for row in run.report.rows.values()} == {"RegionalFlux", other.name}


def blind_half(call: Call) -> torch.Tensor:
    """Two groups that part a sequence of tokens in the middle."""
    halves = torch.zeros(1, call.query.shape[2], 2, dtype=torch.bool)
    halves[:, : call.query.shape[2] // 2, 0] = True
    halves[..., 1] = ~halves[..., 0]
    return halves


def test_layers_between_are_open() -> None:
    """With every=2 the second layer lets the cat's text reach the right half, in one layer of its own."""
    family = FAMILIES["qwen"]
    pictures = []
    for every in (1, 2):
        pipe = family.make()
        with ac.control(pipe, ac.RegionalFlux(LEFT, entity_tokens=4, every=every, base_ratio=0.0)):
            pictures.append(draw(pipe, family, steps=1))
    assert not torch.allclose(*pictures, atol=1e-4)


def test_what_cannot_work_is_refused() -> None:
    pipe = FAMILIES["flux"].make()
    for other in (ac.EliGen(LEFT), ac.RegionalFlux(LEFT), ac.RAG(LEFT)):
        sentence = "cannot work together: both put text of the regions behind the prompt"
        with pytest.raises(ac.ControlError, match=sentence), ac.control(pipe, ac.RegionalFlux(LEFT), other):
            pass
    late = ac.RegionalFlux(LEFT, window=ac.Window(0.0, 0.5))
    with pytest.raises(ac.ControlError, match=r"keep these, and use the method's own shares"), ac.control(pipe, late):
        draw(pipe, FAMILIES["flux"])
    with (
        pytest.raises(ac.ControlError, match=r"need joint attention"),
        ac.control(tiny_pipe := tiny.sd(), ac.RegionalFlux(REGIONS)),
    ):
        tiny.draw(tiny_pipe, steps=1)


def test_every_prompt_may_have_a_background_of_its_own() -> None:
    regions = with_text((LEFT, LEFT), ["a cat", "a dog"], ["a wall", ""])
    assert [rs[0].text for rs in regions] == ["a wall", "a dog"]
    with pytest.raises(ac.ControlError, match="1 backgrounds for 2 prompts"):
        with_text((LEFT, LEFT), ["a cat", "a dog"], ["a wall"])
