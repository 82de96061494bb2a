"""EliGen against its card, on three kinds of joint attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import attnctrl as ac
from attnctrl.controls.layout.eligen import entity_groups, hidden_groups
from attnctrl.controls.layout.entities import Entities
from attnctrl.kernels import TokenGroups
from attnctrl.sites import Call, Site, TokenLayout
from tests import tiny
from tests.methods import sampling, step
from tests.parts import Tiny
from tests.probes import REGIONS, Output
from tests.transformers import FAMILIES, draw

JOINT = ac.Where(kinds=("joint",))
SITE = Site("block.attn", "joint", "", 0)
NAMES = ("flux", "sd3", "qwen")
on_joint_models = pytest.mark.parametrize("family", [FAMILIES[name] for name in NAMES], ids=NAMES)


def matrix(make: Any, regions: Any = REGIONS, prompts: Any = "a cat and a dog") -> torch.Tensor:
    """What sees what, bool (batch, 10, 10): two tokens of the prompt, two of each entity, latents of 2 x 2."""
    given = replace(sampling(prompts), sites=[SITE], text_tokens=2)
    entities = Entities.begin(given, regions, JOINT)
    layout = TokenLayout(slice(6, 10), slice(0, 6), (1, 2, 2))
    empty = torch.empty(len(given.prompts or ()), 1, 10, 1)
    call = Call(SITE, step(0), "cond", empty, empty, empty, 1.0, layout, layout)
    groups = entities.mask(call, make)
    assert isinstance(groups, TokenGroups)
    assert entities.mask(call, make) is groups
    return groups.dense()[:, 0]


def test_what_sees_what_by_hand() -> None:
    """Cat on the left, dog on the right half; latents 6 and 8 are left, 7 and 9 right."""
    expected = """
        pp.. ..llll
        pp.. ..llll
        ..cc ..l.l.
        ..cc ..l.l.
        .... dd.l.l
        .... dd.l.l
        ppcc ..llll
        pp.. ddllll
        ppcc ..llll
        pp.. ddllll
    """
    rows = [[c != "." for c in line.replace(" ", "")] for line in expected.strip().splitlines()]
    assert matrix(entity_groups)[0].tolist() == rows


def test_hidden_entities_leave_the_rest_as_it_is() -> None:
    seen = matrix(hidden_groups)[0]
    rest = [0, 1, 6, 7, 8, 9]
    assert seen[rest][:, rest].all()
    assert not seen[:, 2:6].any()


def test_a_prompt_with_fewer_regions_has_blocks_that_nobody_sees() -> None:
    seen = matrix(entity_groups, regions=(REGIONS, REGIONS[:1]), prompts=["a cat and a dog", "a cat"])
    assert seen[0, 7, 4:6].all()
    assert not seen[1, :, 4:6].any()


@on_joint_models
def test_without_regions_it_is_the_stock_picture(family: Tiny) -> None:
    pipe = family.make()
    expected = draw(pipe, family)
    for idle in (ac.EliGen(()), ac.EliGen(REGIONS, until=0.0)):
        with ac.control(pipe, idle):
            assert torch.equal(draw(pipe, family), expected)


@on_joint_models
def test_entities_out_of_sight_change_nothing(family: Tiny) -> None:
    """`until` ends before the second step: from there on, and from its noise, the picture is the stock one."""
    pipe = family.make()
    expected = draw(pipe, family, steps=1)
    late = ac.EliGen(REGIONS, entity_tokens=4, until=0.001)
    with ac.control(pipe, late) as run:
        drawn = draw(pipe, family, steps=4)
    assert {row.point for row in run.report.rows.values()} == {"context", "mask"}
    assert torch.isfinite(drawn).all()
    with ac.control(pipe, ac.EliGen(REGIONS, entity_tokens=4)):
        assert not torch.allclose(draw(pipe, family, steps=1), expected, atol=1e-4)


@on_joint_models
def test_an_entity_reaches_its_own_region_alone(family: Tiny) -> None:
    """In the first layer, another text for the cat changes what the left half gets, and nothing else of the picture."""
    pipe, outputs = family.make(), []
    keep = Output(edit=lambda output: (outputs.append(output), output)[1], where=JOINT)
    for word in ("cat", "bird"):
        regions = (ac.Region("cat", box=REGIONS[0].box, prompt=word), REGIONS[1])
        with ac.control(pipe, ac.EliGen(regions, entity_tokens=4), keep) as run:
            draw(pipe, family, steps=1)
    joint = [s for s in run.sampling.sites if s.kind == "joint"]
    one, other = outputs[0], outputs[len(joint)]
    changed = ~torch.isclose(one, other, atol=1e-6).all(dim=(1, 3))[0]
    frames, height, width = family.grid
    count = frames * height * width
    text_first = not changed[:count].any() or family is not FAMILIES["sd3"]
    latents = changed[-count:] if text_first else changed[:count]
    left = torch.zeros(height, width, dtype=torch.bool)
    left[:, : width // 2] = True
    assert torch.equal(latents, left.flatten())


@on_joint_models
def test_the_unconditional_branch_is_the_stock_one(family: Tiny) -> None:
    pipe, seen = family.make(), []
    keep = Output(edit=lambda output: (seen.append(output), output)[1], where=JOINT, branches=("uncond",))
    with ac.control(pipe, keep):
        draw(pipe, family, steps=1)
    stock = list(seen)
    seen.clear()
    with ac.control(pipe, ac.EliGen(REGIONS, entity_tokens=4), keep):
        draw(pipe, family, steps=1)
    count = family.grid[1] * family.grid[2]
    latents = slice(0, count) if family is FAMILIES["sd3"] else slice(-count, None)
    for one, other in zip(stock, seen, strict=True):
        torch.testing.assert_close(one[:, :, latents], other[:, :, latents], atol=1e-5, rtol=1e-5)


def test_models_with_text_keys_are_refused() -> None:
    pipe = tiny.sd()
    with (
        pytest.raises(ac.ControlError, match=r"need joint attention.*this model has cross, self: use RegionPrompts"),
        ac.control(pipe, ac.EliGen(REGIONS)),
    ):
        tiny.draw(pipe, steps=1)
