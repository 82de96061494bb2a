"""RAG against its card, on joint attention and on UNets."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnctrl as ac
from attnctrl.controls.layout.rag import bind, box_of, global_groups, regional_groups
from attnctrl.guidance import Crop, Prediction
from tests import tiny
from tests.joint_models import (
    assert_batch_is_the_single_ones,
    changed,
    first_outputs,
    latent_rows,
    matrix,
    on_joint_models,
    seen,
)
from tests.parts import Tiny
from tests.probes import REGIONS, Guide, Nudge
from tests.transformers import FAMILIES, draw

CORNERS = (ac.Region("cat", box=(0.0, 0.0, 0.5, 0.5)), ac.Region("dog", box=(0.5, 0.0, 1.0, 0.5)))
LEFT = (ac.Region("cat", box=(0.0, 0.0, 0.5, 1.0)),)


def binding(regions: Any = LEFT, **params: Any) -> ac.RAG:
    return ac.RAG(regions, soft_refinement=0.0, **{"hard_binding": 1.0, **params})


def refining(regions: Any = LEFT, **params: Any) -> ac.RAG:
    return ac.RAG(regions, hard_binding=0.0, **{"entity_tokens": 4, **params})


def test_what_sees_what_by_hand() -> None:
    """Text of prompt, cat and dog, then the latents: cat, dog, and two of no region."""
    assert matrix(regional_groups, CORNERS)[0].tolist() == seen("""
        p.. llll
        .c. llll
        ..d llll
        .c. llll
        ..d llll
        p.. llll
        p.. llll
    """)
    assert matrix(global_groups, CORNERS)[0].tolist() == seen("""
        ... ....
        ... ....
        ... ....
        p.. llll
        p.. llll
        ... ....
        ... ....
    """)


def test_a_prompt_with_fewer_regions_sees_no_empty_blocks() -> None:
    found = matrix(regional_groups, (CORNERS, CORNERS[:1]), ["a cat and a dog", "a cat"])
    assert found[0, 4, 2]
    assert not found[1, :, 2].any()
    assert found[1, 4].tolist() == seen("p.. llll")[0]


def test_binding_by_hand() -> None:
    """Two pictures of one channel on 4 x 6 pixels, tokens of 2 x 2: the second gets the middle token's upper part."""
    whole, crop = torch.zeros(2, 1, 4, 6), Crop(slice(1, 2), slice(0, 2), slice(1, 3))
    inside = torch.tensor([[True, False], [False, False]])
    part = torch.arange(1.0, 17.0).reshape(1, 1, 4, 4)
    bound = bind(whole, part, inside, crop)
    expected = torch.zeros(2, 1, 4, 6)
    expected[1, 0, :2, 2:4] = torch.tensor([[1.0, 2.0], [5.0, 6.0]])
    assert torch.equal(bound, expected)
    assert not whole.any()
    assert box_of(torch.tensor([[0, 0, 0], [0, 1, 1], [0, 1, 0]]).bool()) == (slice(1, 3), slice(1, 3))


@on_joint_models
def test_without_effect_it_is_the_stock_picture(family: Tiny) -> None:
    pipe = family.make()
    expected = draw(pipe, family)
    for idle in (ac.RAG(()), ac.RAG(LEFT, hard_binding=0.0, soft_refinement=0.0)):
        with ac.control(pipe, idle):
            assert torch.equal(draw(pipe, family), expected)


@on_joint_models
@pytest.mark.parametrize("free", [False, True])
def test_the_box_gets_the_regions_own_prediction(family: Tiny, free: bool) -> None:
    """Inside, guidance of both branches on the crop under the phrase; outside, the pipeline's own combination."""
    seen: list[tuple[Prediction, torch.Tensor]] = []
    texts: list[Any] = []
    size = family.grid[1:]
    crop = Crop(slice(0, 1), slice(0, size[0]), slice(0, size[1] // 2))

    class Look(ac.Control):
        def context(self, text: Any, sampling: Any) -> Any:
            texts.append(sampling.encode(["cat"]))
            return text

        def guide(self, prediction: Prediction, step: Any, state: Any) -> torch.Tensor:
            part = prediction.again(texts[0].positive, pooled=texts[0].pooled, crop=crop)
            if prediction.uncond is not None:
                none = prediction.again(crop=crop, branch="uncond")
                part = none + prediction.scale * (part - none)
            seen.append((prediction, part))
            return prediction.combined

    pipe, result = family.make(), Guide()
    with ac.control(pipe, Look(), binding(), result):
        draw(pipe, family, steps=1, free=free)
    (before, part), after = seen[0], result.got[0].combined
    half = before.combined.shape[-1] // 2
    torch.testing.assert_close(after[..., :half], part, atol=1e-5, rtol=1e-5)
    assert torch.equal(after[..., half:], before.combined[..., half:])
    assert not torch.allclose(after[..., :half], before.combined[..., :half], atol=1e-3)


@on_joint_models
def test_while_it_is_bound_a_region_is_a_picture_of_its_own(family: Tiny) -> None:
    """What lies outside the box has no influence on what is inside, over several steps; nor has the prompt."""
    drawn = []
    for prompt, outside in (("a cat and a dog", 0.0), ("a dog and a cat", 0.0), ("a cat and a dog", 0.5)):

        class Start(ac.Control):
            shift = outside

            def noise(self, noise: torch.Tensor, sampling: Any, state: Any) -> torch.Tensor:
                moved = noise.clone()
                moved[..., noise.shape[-1] // 2 :] += self.shift
                return moved

        pipe, last = family.make(), Keep()
        with ac.control(pipe, Start(), binding(), last):
            draw(pipe, family, prompt, free=True)
        drawn.append(last.got[-1])
    half = drawn[0].shape[-1] // 2
    for other in drawn[1:]:
        torch.testing.assert_close(other[..., :half], drawn[0][..., :half], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(other[..., half:], drawn[0][..., half:], atol=1e-4)


class Keep(ac.Control):
    """The latents after each step."""

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "got", [])

    def latents(self, latents: torch.Tensor, step: Any, state: Any) -> torch.Tensor:
        self.got.append(latents)  # type: ignore[attr-defined]
        return latents


def test_binding_ends_where_it_should() -> None:
    """The number of passes through the denoiser: 2 more per step and region in the first half, with guidance."""
    family = FAMILIES["sd3"]
    pipe, calls = family.make(), []
    pipe.transformer.register_forward_hook(lambda m, a, o: calls.append(len(o[0])))
    with ac.control(pipe, binding(REGIONS, hard_binding=0.5)):
        draw(pipe, family, steps=4)
    assert calls == [2, 1, 1, 1, 1] * 2 + [2] * 2


@on_joint_models
def test_refinement_reaches_the_region_alone(family: Tiny) -> None:
    """One layer: another text of the cat changes what the cat's latents get, and no others."""
    one = first_outputs(family, refining())
    two = first_outputs(family, refining((ac.Region("cat", box=LEFT[0].box, prompt="bird"),)))
    left = torch.zeros(family.grid[1:], dtype=torch.bool)
    left[:, : family.grid[2] // 2] = True
    assert torch.equal(changed(one, two, family)[0], left)


@on_joint_models
def test_refinement_is_mixed_in_by_its_share(family: Tiny) -> None:
    """In the first layer latents get delta * regional + (1 - delta) * stock; outside the regions they get the stock."""
    full, part, stock = (
        latent_rows(first_outputs(family, control), family)
        for control in (refining(), refining(soft_refinement=0.25), Nudge(by=0.0))
    )
    torch.testing.assert_close(part, 0.25 * full + 0.75 * stock, atol=1e-5, rtol=1e-5)
    _, height, width = family.grid
    outside = torch.ones(height, width, dtype=torch.bool)
    outside[:, : width // 2] = False
    rows = outside.flatten().nonzero().flatten()
    torch.testing.assert_close(full[:, :, rows], stock[:, :, rows], atol=1e-5, rtol=1e-5)


@on_joint_models
def test_the_prompt_for_the_whole_picture_changes_nothing(family: Tiny) -> None:
    """One region that is everything and has the prompt's text: latents see the same keys as in the stock model."""
    pipe = family.make()
    expected = draw(pipe, family, steps=2, free=True)
    whole = (ac.Region("cat", box=(0.0, 0.0, 1.0, 1.0), prompt=tiny.PROMPT),)
    with ac.control(pipe, refining(whole, entity_tokens=512, soft_refinement=0.5)):
        drawn = draw(pipe, family, steps=2, free=True)
    if family is FAMILIES["qwen"]:
        # Its text has positions, and a region's stands behind the prompt.
        assert not torch.equal(drawn, expected)
    else:
        torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=1e-4)


@on_joint_models
def test_a_batch_gives_the_single_pictures(family: Tiny) -> None:
    assert_batch_is_the_single_ones(family, lambda regions: ac.RAG(regions, hard_binding=0.5, entity_tokens=4))


@on_joint_models
def test_it_composes(family: Tiny) -> None:
    pipe, about = family.make(), ac.RAG(LEFT, entity_tokens=4)
    with ac.control(pipe, about):
        alone = draw(pipe, family, steps=2)
    with ac.control(pipe, about, Nudge(by=0.3)) as run:
        nudged = draw(pipe, family, steps=2)
    assert not torch.allclose(nudged, alone, atol=1e-3)
    assert {row.control for row in run.report.rows.values()} == {"RAG", "Nudge"}
    assert {row.point for row in run.report.rows.values()} == {"context", "inputs", "mask", "guide", "latents"}


def test_on_unets_the_refinement_is_that_of_region_prompts() -> None:
    pipe = tiny.sd()
    with ac.control(pipe, ac.RegionPrompts(LEFT, base_ratio=0.25, confine=False, window=ac.Window())):
        expected = tiny.draw(pipe)
    with ac.control(pipe, refining(soft_refinement=0.75)):
        torch.testing.assert_close(tiny.draw(pipe), expected, atol=1e-4, rtol=1e-4)


def test_a_mask_binds_its_own_pixels_alone() -> None:
    """A triangle on a UNet: of its bounding box, what is not inside follows the pipeline."""
    region = ac.Region("cat", polygon=((0.0, 0.0), (0.5, 0.0), (0.0, 0.5)))
    pipe, before, after = tiny.sd(), Guide(), Guide()
    with ac.control(pipe, before, binding((region,)), after):
        tiny.draw(pipe, steps=1)
    moved = (before.got[0].combined != after.got[0].combined)[0, 0]
    assert torch.equal(moved, region.raster(16, 16, "any") > 0)


def test_two_that_need_the_sequence_are_refused_and_binding_alone_is_not() -> None:
    pipe = FAMILIES["flux"].make()
    with (
        pytest.raises(ac.ControlError, match="RAG and EliGen cannot work together: both put text of the regions"),
        ac.control(pipe, ac.RAG(LEFT), ac.EliGen(LEFT)),
    ):
        pass
    with ac.control(pipe, binding(), ac.EliGen(LEFT, entity_tokens=4)) as run:
        draw(pipe, FAMILIES["flux"], steps=2)
    assert {row.control for row in run.report.rows.values()} == {"RAG", "EliGen"}
