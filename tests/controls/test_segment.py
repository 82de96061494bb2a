"""Masks of words: the formulas by hand, and what a run reads against what it records."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

import attnctrl as ac
from attnctrl.controls.reading import MeanMaps, before, carried, enlarged, own_map, text_shares
from attnctrl.controls.readout.segment import assigned, unit_range
from attnctrl.sites import Call, Site
from tests import tiny
from tests.editing.material import picture
from tests.joint import joint_call
from tests.methods import self_map
from tests.probes import Inputs
from tests.spies import watched
from tests.transformers import FAMILIES
from tests.transformers import draw as draw_family

COARSE = ac.Where(near=1 / 16)
SIZE = (32, 32)


def test_a_cell_stays_at_its_part_of_the_picture() -> None:
    maps = torch.zeros(1, 1, 16, 16)
    maps[..., 3, 10] = 1
    row, column = divmod(int(enlarged(maps, 512, 512).argmax()), 512)
    assert abs(row + 0.5 - 3.5 * 32) <= 16
    assert abs(column + 0.5 - 10.5 * 32) <= 16


def test_the_range_is_0_to_1() -> None:
    maps = torch.tensor([[[[1.0, 3.0], [2.0, 5.0]], [[0.4, 0.4], [0.4, 0.4]]]])
    expected = torch.tensor([[[[0.0, 0.5], [0.25, 1.0]], [[0.0, 0.0], [0.0, 0.0]]]])
    torch.testing.assert_close(unit_range(maps), expected)


def test_the_largest_map_above_the_threshold_takes_the_pixel() -> None:
    maps = torch.tensor([[[[0.9, 0.6, 0.2]], [[0.8, 0.7, 0.1]]]])
    assert assigned(maps, 0.5).tolist() == [[[[True, False, False]], [[False, True, False]]]]
    several = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    masks = [assigned(several, t) for t in (0.0, 0.3, 0.6, 0.9)]
    for more, fewer in pairwise(masks):
        assert not (fewer & ~more).any()  # a higher threshold only takes away
    assert (masks[0].sum(dim=1) == 1).all()


def test_self_attention_carries_maps_on() -> None:
    matrix = torch.tensor([[0.5, 0.5, 1e-9, 1e-9], [0.25, 0.75, 1e-9, 1e-9], [1e-9, 1e-9, 0.9, 0.1], [0.25] * 4])
    matrix = matrix / matrix.sum(dim=1, keepdim=True)
    own, maps = self_map(matrix, (2, 2)), torch.tensor([[[1.0, 0.0, 2.0, 4.0]]])
    torch.testing.assert_close(carried(maps, own, 1), torch.tensor([[[0.5, 0.25, 2.2, 1.75]]]), atol=1e-5, rtol=0)
    torch.testing.assert_close(carried(maps, own, 2)[0, 0], matrix @ matrix @ maps[0, 0], atol=1e-5, rtol=0)
    uniform = self_map(torch.full((4, 4), 0.25), (2, 2))
    torch.testing.assert_close(carried(maps, uniform, 1), torch.full((1, 1, 4), 1.75))
    assert carried(maps, own, 0) is maps
    assert carried(maps, None, 3) is maps


def test_the_mean_counts_a_layer_once_a_step() -> None:
    mean, fine, coarse = MeanMaps(), (1, 2, 2), (1, 1, 1)
    for at, site, grid, value in (
        (0, "a", fine, 9.0),
        (0, "a", fine, 1.0),  # again in the same step: this one counts
        (0, "b", fine, 3.0),
        (1, "a", fine, 5.0),
        (1, "c", coarse, 7.0),
    ):
        mean.add(at, site, grid, torch.full((1, 1, grid[1] * grid[2]), value))
    found = mean.means()
    assert list(found) == [fine, coarse]
    torch.testing.assert_close(found[fine], torch.full((1, 1, 2, 2), 3.0))
    torch.testing.assert_close(found[coarse], torch.full((1, 1, 1, 1), 7.0))
    assert mean.means()[fine].equal(found[fine])  # asking changes nothing


def test_which_self_attention_a_layer_follows() -> None:
    layers = [Site("a", "self", "down", 0, 0), Site("b", "self", "up", 4, 0), Site("c", "self", "mid", 2, 1)]
    found = before(Site("x", "cross", "up", 5, 0), layers)
    assert found is layers[1]
    assert before(Site("x", "cross", "down", 1, 0), layers) is layers[0]
    assert before(Site("x", "cross", "down", 1, 1), layers) is None
    joint = Site("j", "joint", "", 3)
    assert before(joint, layers) is joint


def test_text_shares_of_both_kinds_of_attention() -> None:
    call = joint_call((1, 2, 3), text=4, heads=2, head_dim=5)
    scores = call.query[:, :, 4:] @ call.key[:, :, :4].mT * call.scale
    torch.testing.assert_close(text_shares(call), scores.softmax(dim=-1).mean(dim=1))
    own = (call.query[:, :, 4:] @ call.key[:, :, 4:].mT * call.scale).softmax(dim=-1).mean(dim=1)
    torch.testing.assert_close(own_map(call).dense(), own)
    hidden = torch.zeros(1, 1, 1, 10)
    hidden[..., 3] = float("-inf")
    assert text_shares(call.change(mask=hidden))[..., 3].abs().max() == 0


def segmented(control: ac.Segment, *more: ac.Control, prompt: str = tiny.PROMPT, **kwargs: object) -> tuple:
    pipe = tiny.sd()
    with ac.control(pipe, control, *more, record=["cat", "dog"]) as run:
        drawn = tiny.draw(pipe, prompt, steps=2, **kwargs)
    return control.read(run, SIZE), run, drawn


def test_it_reads_what_a_run_records() -> None:
    control = ac.Segment(("cat", "dog"), refinements=0, where=COARSE, threshold=0.5)
    read, run, drawn = segmented(control)
    for i, phrase in enumerate(("cat", "dog")):
        expected = unit_range(enlarged(run.maps[phrase].mean(dim=0)[None, None], 32, 32))[0, 0]
        torch.testing.assert_close(read.maps[0, i], expected, atol=1e-4, rtol=0)
    assert read.masks.equal(assigned(read.maps, 0.5))
    assert read.phrases == (("cat", "dog"),)
    inside = np.asarray(read.mask("dog"))
    assert inside.shape == (32, 32)
    assert (inside == 255).sum() == int(read.masks[0, 1].sum())
    # Reading leaves the picture as it was.
    torch.testing.assert_close(drawn, tiny.draw(tiny.sd(), steps=2), atol=1e-5, rtol=1e-5)
    with pytest.raises(ac.ControlError, match='picture 0 has no mask of "bird": there are those of cat, dog'):
        read.mask("bird")


def test_refinement_uses_the_self_attention_before_each_layer() -> None:
    kept: dict[str, torch.Tensor] = {}
    middle = ac.Where(kinds=("cross", "self"), blocks=("mid",))

    def keep(call: Call) -> Call:
        probs = (call.query @ call.key.mT * call.scale).softmax(dim=-1).mean(dim=1)
        kept[call.site.name] = probs[0]
        return call

    control = ac.Segment(("dog",), refinements=1, where=middle)
    pipe = tiny.sd()
    with ac.control(pipe, control, Inputs(edit=keep, where=middle), record=False) as run:
        tiny.draw(pipe, steps=1)
    (own,), (cross,) = ([m for n, m in kept.items() if n.endswith(end)] for end in ("attn1", "attn2"))
    (position,) = run.sampling.find("dog")
    expected = (own @ cross[:, position]).reshape(1, 1, 8, 8)
    read = control.read(run, (8, 8))
    torch.testing.assert_close(read.maps, unit_range(expected), atol=1e-4, rtol=0)


def test_the_nouns_are_what_is_asked_for_by_default() -> None:
    pipe, control = tiny.sd(), ac.Segment()
    with ac.control(pipe, control, record=False) as run:
        tiny.draw(pipe, ["a cat and a dog", "the bird"], steps=1, num_images_per_prompt=2)
    read = control.read(run, SIZE)
    assert read.phrases == (("cat", "dog"),) * 2 + (("bird",),) * 2
    assert read.maps.shape == (4, 2, 32, 32)
    assert not read.masks[2:, 1].any()  # the prompt with one noun has no second mask


def test_it_composes_with_a_mask() -> None:
    regions = [ac.Region("cat", box=(0, 0, 0.5, 1)), ac.Region("dog", box=(0.5, 0, 1, 1))]
    read, run, _ = segmented(ac.Segment(("cat", "dog")), ac.RegionMask(regions))
    assert {row.control for row in run.report.rows.values()} == {"Segment", "RegionMask"}
    assert read.masks.any()


def test_bad_input_is_a_sentence() -> None:
    with pytest.raises(ac.ControlError, match='"bird" is not in the prompt'):
        segmented(ac.Segment(("bird",)))
    with pytest.raises(ac.ControlError, match="Segment took no part in this run"), ac.control(tiny.sd()) as run:
        ac.Segment(("cat",)).read(run, SIZE)
    with pytest.raises(ac.ControlError, match="selects no layer with text"):
        segmented(ac.Segment(("cat",), where=ac.Where(kinds=("self",))))


@pytest.mark.parametrize("name", ["flux", "sd3", "sana"])
def test_other_families(name: str) -> None:
    family = FAMILIES[name]
    pipe, control = family.make(), ac.Segment(("cat", "dog"))
    with ac.control(pipe, control, record=False) as run:
        drawn = draw_family(pipe, family)
    read = control.read(run, SIZE)
    assert read.maps.shape[1:] == (2, 32, 32)
    assert torch.isfinite(read.maps).all()
    assert read.maps[0].amax() > 0
    stock = draw_family(family.make(), family)
    torch.testing.assert_close(drawn, stock, atol=1e-4, rtol=1e-4)


def test_a_held_picture_is_what_the_denoiser_sees() -> None:
    pipe = tiny.sd()
    start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    with ac.control(pipe, ac.HoldPicture(picture()), record=False) as run, watched(pipe) as seen:
        drawn = tiny.draw(pipe, steps=4, latents=start, guidance_scale=1.0)
    assert run.sampling is not None
    assert run.sampling.clean is not None
    clean = run.sampling.clean(picture(), start)
    kept = [float(pipe.scheduler.alphas_cumprod[int(t)]) for t in pipe.scheduler.timesteps]
    noise = (start - kept[0] ** 0.5 * clean) / (1 - kept[0]) ** 0.5
    for sample, share in zip(seen.samples, kept, strict=True):
        torch.testing.assert_close(sample, share**0.5 * clean + (1 - share) ** 0.5 * noise, atol=1e-3, rtol=1e-3)
    last = float(pipe.scheduler.final_alpha_cumprod)
    torch.testing.assert_close(drawn, last**0.5 * clean + (1 - last) ** 0.5 * noise, atol=1e-3, rtol=1e-3)
    assert ac.HoldPicture(None).idle
