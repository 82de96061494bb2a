"""InstructPix2Pix: a batch of three branches, guided by a text and a picture."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnctrl as ac
from attnctrl.guidance import Prediction
from attnctrl.kernels import probabilities
from attnctrl.processors.work import thirds_of
from tests import tiny
from tests.probes import REGIONS, Context, Guide, Inputs, Latents, Mask, Noise, Token, all_visible, only_first_key
from tests.spies import assert_restored, snapshot, watched

COND, IMAGE, UNCOND = (slice(i, i + 1) for i in range(3))
EVERYWHERE = ac.Where(kinds=("cross", "self"))
THREE = ("cond", "image", "uncond")


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.instruct()


@pytest.fixture(scope="module")
def stock(pipe: Any) -> torch.Tensor:
    return tiny.instructed(pipe)


def test_without_controls_it_is_the_stock_pipeline(pipe: Any, stock: torch.Tensor) -> None:
    before = snapshot(pipe)
    with ac.control(pipe):
        assert torch.equal(tiny.instructed(pipe), stock)
    with ac.control(pipe, ac.FocusOnInstruction(()), ac.Lime(window=ac.Window(0.5, 0.5))):
        assert torch.equal(tiny.instructed(pipe), stock)
    with ac.control(pipe, record=["cat"]):
        assert torch.equal(tiny.instructed(pipe), stock)
    assert_restored(before, pipe)


def test_a_mask_that_hides_nothing_changes_nothing(pipe: Any, stock: torch.Tensor) -> None:
    with ac.control(pipe, Mask(make=all_visible, where=EVERYWHERE, branches=THREE)):
        torch.testing.assert_close(tiny.instructed(pipe), stock, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("branch", "rows"), list(zip(THREE, (COND, IMAGE, UNCOND), strict=True)), ids=THREE)
def test_a_mask_acts_in_the_branch_it_asks_for(pipe: Any, branch: str, rows: slice) -> None:
    seen = []
    for controls in ((), (Mask(make=only_first_key, branches=(branch,)),)):
        with ac.control(pipe, *controls), watched(pipe) as spied:
            tiny.instructed(pipe, steps=1)
        seen.append(spied.predictions[0])
    changed = [not torch.allclose(seen[0][r], seen[1][r], atol=1e-4) for r in (COND, IMAGE, UNCOND)]
    assert changed == [r is rows for r in (COND, IMAGE, UNCOND)]


def test_recorded_maps_are_those_of_the_text_branch(pipe: Any) -> None:
    read: dict[str, torch.Tensor] = {}

    def keep(call: Any) -> Any:
        read[call.site.name] = probabilities(call.query, call.key, call.mask, call.scale).mean(dim=1)[0]
        return call

    near = Inputs(edit=keep, where=ac.Where(near=1 / 16))
    with ac.control(pipe, near, record=["dog"]) as run:
        tiny.instructed(pipe, steps=1)
    (position,) = run.sampling.find("dog")  # type: ignore[union-attr]
    expected = torch.stack([maps[:, position] for maps in read.values()]).mean(dim=0)
    torch.testing.assert_close(run.maps["dog"][0].flatten(), expected, atol=1e-6, rtol=1e-5)


def test_guidance_is_read_with_both_scales(pipe: Any, stock: torch.Tensor) -> None:
    guide = Guide()
    with ac.control(pipe, guide):
        torch.testing.assert_close(tiny.instructed(pipe), stock, atol=1e-5, rtol=1e-5)
    one: Prediction = guide.got[0]
    assert one.scales == pytest.approx((4.0, 1.5), abs=1e-2)
    assert one.scale == one.scales[0]
    assert one.image is not None
    assert one.uncond is not None
    expected = one.uncond + 4.0 * (one.cond - one.image) + 1.5 * (one.image - one.uncond)
    torch.testing.assert_close(one.combined, expected)
    torch.testing.assert_close(one.guided(one.cond), one.combined, atol=1e-5, rtol=1e-5)
    # What the next control sees leads where the last one wanted.
    wanted = one.combined + torch.randn(one.combined.shape, generator=torch.Generator().manual_seed(0))
    after = one.after(wanted)
    torch.testing.assert_close(one.guided(after.cond), wanted, atol=1e-4, rtol=1e-4)


def test_a_further_prediction_of_each_branch_is_that_branchs() -> None:
    pipe, found = tiny.instruct(), {}

    def ask(prediction: Prediction) -> torch.Tensor:
        found.update({name: prediction.again(branch=name) for name in THREE})
        found["whole"] = torch.cat([prediction.cond, prediction.image, prediction.uncond])  # type: ignore[list-item]
        return prediction.combined

    with ac.control(pipe, Guide(make=ask)):
        tiny.instructed(pipe, steps=1)
    torch.testing.assert_close(torch.cat([found[n] for n in THREE]), found["whole"], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found["cond"], found["image"], atol=1e-5)
    assert not torch.allclose(found["uncond"], found["image"], atol=1e-5)


def test_changed_text_reaches_the_text_branch_alone(pipe: Any) -> None:
    context = Context()
    with ac.control(pipe, context), watched(pipe) as seen:
        tiny.instructed(pipe, steps=1)
    text = context.got[0]
    assert torch.equal(seen.texts[0], torch.cat([text.positive + 1, text.negative, text.negative]))


def test_losses_move_what_is_drawn_and_not_the_given_picture(pipe: Any) -> None:
    seen = []
    for controls in ((), (Token(scale=50.0), Noise(edit=lambda noise: 1.1 * noise))):
        with ac.control(pipe, *controls), watched(pipe) as spied:
            tiny.instructed(pipe, steps=1)
        seen.append(spied.samples[0])
    assert torch.equal(seen[0][:, 4:], seen[1][:, 4:])
    assert not torch.allclose(seen[0][:, :4], seen[1][:, :4], atol=1e-3)
    assert torch.equal(seen[1][COND, :4], seen[1][UNCOND, :4])
    assert seen[0][IMAGE, 4:].any()
    assert not seen[0][UNCOND, 4:].any()


def test_without_guidance_there_is_the_text_branch_alone(pipe: Any) -> None:
    expected, guide, latents = tiny.instructed(pipe, guidance_scale=1.0), Guide(), Latents()
    with ac.control(pipe, Mask(make=all_visible, branches=THREE), guide):
        found = tiny.instructed(pipe, guidance_scale=1.0)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert guide.got[0].uncond is None
    assert guide.got[0].image is None
    with ac.control(pipe, latents, ac.RegionMask(REGIONS)):
        tiny.instructed(pipe, guidance_scale=1.0, steps=2)
    assert [index for index, _ in latents.got] == [0, 1]


def test_several_prompts_with_several_pictures_each(pipe: Any) -> None:
    prompts, rows = ["a cat and a dog", "the red bird and a dog"], []
    keep = Inputs(edit=lambda call: (rows.append((call.branch, len(call.query))), call)[1], branches=THREE)
    with ac.control(pipe, keep, record=["dog"]) as run:
        tiny.instructed(pipe, prompts, num_images_per_prompt=2, steps=1)
    assert set(rows) == {(name, 4) for name in THREE}
    assert run.sampling is not None
    assert run.sampling.batch == 4
    assert run.sampling.find("dog", 0) != run.sampling.find("dog", 1)


def test_the_rows_of_a_batch() -> None:
    assert [(b.name, b.rows) for b in thirds_of(6, 2)] == [
        ("cond", slice(0, 2)),
        ("image", slice(2, 4)),
        ("uncond", slice(4, 6)),
    ]
    assert [b.name for b in thirds_of(2, 2)] == ["cond"]
    with pytest.raises(ac.ControlError, match=r"batch of 4 for 2 pictures: InstructPix2Pix"):
        thirds_of(4, 2)


def test_sharing_and_compiling(pipe: Any) -> None:
    with ac.control(pipe), pytest.raises(ac.ControlError, match="inside a control block"):
        ac.share(pipe)
    compiled = tiny.instruct()
    compiled.unet.compile(backend="eager")
    with pytest.raises(ac.ControlError, match="is compiled"), ac.control(compiled, ac.RegionMask(REGIONS)):
        tiny.instructed(compiled)
