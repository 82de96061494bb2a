"""DesignEdit against its card, its layers, and the trajectories that it needs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import attnctrl as ac
from attnctrl.controls.editing.design_edit import pasted
from attnctrl.layers import footprint, shifted
from attnctrl.pipelines import EditPipeline
from tests import tiny
from tests.editing.material import EDIT, SOURCE, attention, call, draw, pair, picture
from tests.joint_models import on_joint_models
from tests.parts import Tiny
from tests.spies import assert_restored, snapshot
from tests.transformers import draw as draw_joint

LEFT = np.zeros((32, 32), np.uint8)
LEFT[8:16, 4:12] = 255  # latents 4..8 down, 2..6 across
RUN: dict[str, Any] = {"num_inference_steps": 3, "guidance": 4.0}


def test_pasting_by_hand() -> None:
    layer = torch.arange(12.0).reshape(3, 4)
    inside = layer == 5  # row 1, column 1
    canvas = torch.full((3, 4), -1.0)
    made = pasted(canvas, layer, inside, down=1, right=-1)
    assert made[2, 0] == 5
    assert (made == -1).sum() == 11
    assert torch.equal(pasted(layer, layer, inside, 0, 0), layer)  # an object that stays, on the source
    assert torch.equal(pasted(canvas, layer, inside, 5, 0), canvas)
    assert torch.equal(shifted(layer, -1, 2), torch.tensor([[0, 0, 4, 5], [0, 0, 8, 9], [0, 0, 0, 0.0]]))


def whole(grid: int = 16) -> np.ndarray:
    return np.full((grid, grid), 255, np.uint8)


def test_zero_keys_everywhere_give_the_mean_of_the_values() -> None:
    control = ac.DesignEdit([ac.Layer(whole(), remove=True)])
    given = call("self")
    made = control.inputs(given, control.begin(pair()))
    expected = given.value[1].mean(dim=1, keepdim=True).expand(-1, 4, -1)
    torch.testing.assert_close(attention(made)[1], expected)
    assert torch.equal(made.key[0], given.key[0])
    late = call("self", at=40)
    assert control.inputs(late, control.begin(pair())) is late


@pytest.mark.parametrize("masking", ["zero-key", "-inf"])
def test_masked_keys(masking: str) -> None:
    """Of 2 x 2 tokens the left column is masked: weight exp(0) each beside the others', or none."""
    mask = np.zeros((16, 16), np.uint8)
    mask[:, :8] = 255
    control = ac.DesignEdit([ac.Layer(mask, remove=True, margin=0.0)], masking=masking)
    given = call("self")
    made = control.inputs(given, control.begin(pair()))
    weights = (given.query[1] @ given.key[1].mT * given.scale).exp()
    weights[..., [0, 2]] = 1.0 if masking == "zero-key" else 0.0
    expected = weights / weights.sum(dim=-1, keepdim=True) @ given.value[1]
    seen = made.mask.expand(2, 2, 4, 4) if made.mask is not None else None
    torch.testing.assert_close(attention(made.change(mask=seen))[1], expected)
    torch.testing.assert_close(attention(made.change(mask=seen))[0], attention(given)[0])


def test_refining_hides_more_in_the_first_half() -> None:
    corner = np.zeros((16, 16), np.uint8)
    corner[8:, 8:] = 255
    mask = np.zeros((16, 16), np.uint8)
    mask[:8, :8] = 255
    control = ac.DesignEdit([ac.Layer(mask, remove=True, margin=0.0)], refine=corner)
    state = control.begin(pair())
    early, late = state.hidden[1, 2, 2]
    assert early.tolist() == [1, 0, 0, 1]
    assert late.tolist() == [1, 0, 0, 0]
    given = call("self", at=25)
    assert torch.equal(control.inputs(given, state).key[1, :, 3], given.key[1, :, 3])


def test_outside_the_holes_the_latents_are_the_sources_and_the_layer_moves() -> None:
    control = ac.DesignEdit([ac.Layer(LEFT, dx=0.5, margin=0.0)], fuse_at=1.0)
    drawn = draw(tiny.sd(), [SOURCE, EDIT], control)
    hole = torch.zeros(16, 16, dtype=torch.bool)
    hole[4:8, 2:6] = True
    there = shifted(hole.float(), 0, 8) > 0
    assert torch.equal(drawn[1][:, ~hole & ~there], drawn[0][:, ~hole & ~there])
    assert torch.equal(drawn[1, :, 4:8, 10:14], drawn[0, :, 4:8, 2:6])  # pasted at the end
    assert not torch.isclose(drawn[1][:, hole], drawn[0][:, hole]).all()


def test_later_steps_are_pulled_to_the_source() -> None:
    layer = [ac.Layer(LEFT, dx=0.5, margin=0.0)]
    far, near = (draw(tiny.sd(), [SOURCE, EDIT], ac.DesignEdit(layer, fuse_at=0.0, pull=p)) for p in (0.0, 1.0))
    free = torch.zeros(16, 16, dtype=torch.bool)
    free[4:8, 2:6] = free[4:8, 10:14] = True
    torch.testing.assert_close(near[1][:, ~free], near[0][:, ~free])
    assert not torch.allclose(far[1][:, ~free], far[0][:, ~free], atol=1e-4)


def test_once_pasted_the_edit_sees_the_sources_text() -> None:
    control = ac.DesignEdit([ac.Layer(whole())])
    state, given = control.begin(pair()), call("cross")
    assert control.inputs(given, state) is given
    state.pasted = True
    made = control.inputs(given, state)
    for now, before in ((made.key, given.key), (made.value, given.value)):
        assert torch.equal(now, before[:1].repeat(2, 1, 1, 1))
    assert torch.equal(made.query, given.query)
    removed = ac.DesignEdit([ac.Layer(whole(), remove=True)])
    state = removed.begin(pair())
    state.pasted = True
    assert removed.inputs(given, state) is given


def test_several_layers_are_pasted_in_order() -> None:
    right = np.roll(LEFT, 16, axis=1)
    both = [ac.Layer(LEFT, dx=0.5, margin=0.0), ac.Layer(right, margin=0.0)]
    drawn = draw(tiny.sd(), [SOURCE, EDIT], ac.DesignEdit(both, fuse_at=1.0))
    assert torch.equal(drawn[1, :, 4:8, 10:14], drawn[0, :, 4:8, 10:14])
    drawn = draw(tiny.sd(), [SOURCE, EDIT], ac.DesignEdit(both[::-1], fuse_at=1.0))
    assert torch.equal(drawn[1, :, 4:8, 10:14], drawn[0, :, 4:8, 2:6])


def test_a_run_without_differences_gives_the_source() -> None:
    """Equal prompts, no mask of keys: nothing has gone, and the object is pasted where it is."""
    control = ac.DesignEdit([ac.Layer(LEFT)], mask_until=0.0)
    drawn = draw(tiny.sd(), [SOURCE, SOURCE], control)
    torch.testing.assert_close(drawn[1], drawn[0], atol=1e-5, rtol=1e-5)


def test_layers_reshape_pictures_about_the_object() -> None:
    """A bar of 2 x 4 pixels at columns 2..4, rows 4..8, twice as large and flipped."""
    mask = np.zeros((16, 16), np.uint8)
    mask[4:8, 2:4] = 255
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[4:8, 2], pixels[4:8, 3] = (255, 0, 0), (0, 0, 255)
    layer = ac.Layer(mask, dx=0.5, resize=2.0)
    assert np.asarray(layer.resized_mask((16, 16))).nonzero()[0].tolist() == [r for r in range(2, 10) for _ in range(4)]
    assert layer.at_end((16, 16)).getbbox() == (9, 2, 13, 10)
    flipped = np.asarray(ac.Layer(mask, flip_horizontal=True).resized(Image.fromarray(pixels)))
    assert flipped[4, 2].tolist() == [0, 0, 255]
    assert flipped[4, 3].tolist() == [255, 0, 0]
    both = [layer, ac.Layer(mask, remove=True, margin=1 / 16)]
    assert footprint(both, (16, 16)).getbbox() == (1, 2, 13, 10)
    assert ac.Layer(mask, remove=True).at_end((16, 16)).getbbox() is None


def test_the_pipeline_inverts_what_is_reshaped_and_keeps_the_rest() -> None:
    pipe, given = tiny.sd(), picture()
    before = snapshot(pipe)
    layers = [ac.Layer(LEFT, dx=0.25, resize=1.5), ac.Layer(np.roll(LEFT, 14, axis=0), flip_vertical=True)]
    (image,) = EditPipeline(pipe)(given, SOURCE, layers=layers, method="design-edit", feather=0, **RUN).images
    changed = np.asarray(footprint(layers, (32, 32))) > 0
    assert np.array_equal(np.asarray(image)[~changed], np.asarray(given)[~changed])
    assert not np.array_equal(np.asarray(image), np.asarray(given))
    assert_restored(before, pipe)
    with pytest.raises(ac.ControlError, match='inversion "virtual" does not make'):
        EditPipeline(pipe)(given, SOURCE, layers=layers, method="design-edit", inversion="virtual", **RUN)


@on_joint_models
def test_flows(family: Tiny) -> None:
    pipe = family.make()
    seeds = {"generator": [torch.Generator().manual_seed(1) for _ in range(2)]}
    mask = np.zeros((32, 48), np.uint8)
    mask[8:16, 8:16] = 255
    with ac.control(pipe, ac.DesignEdit([ac.Layer(mask, dx=0.25)]), record=False) as run:
        drawn = draw_joint(pipe, family, [SOURCE, SOURCE], **seeds)
    assert torch.isfinite(drawn).all()
    assert {row.point for row in run.report.rows.values()} == {"inputs", "latents"}


@pytest.mark.parametrize(
    ("control", "sentence"),
    [
        (ac.DesignEdit([ac.Layer(LEFT, resize=2.0)]), "1 layers that are resized or flipped and 0 trajectories"),
        (ac.DesignEdit([ac.Layer(LEFT, dx=2.0)]), "layer 0 leaves the picture by dx 2.0"),
        (ac.DesignEdit([ac.Layer(whole(), remove=True)], masking="-inf"), "no key is left"),
        (ac.DesignEdit([ac.Layer(np.zeros((32, 32)))]), "all zero"),
        (ac.DesignEdit([ac.Layer(np.ones((32, 64)))]), "aspect ratio"),
    ],
)
def test_bad_layers(control: ac.Control, sentence: str) -> None:
    with pytest.raises(ac.ControlError, match=sentence):
        draw(tiny.sd(), [SOURCE, EDIT], control)


@pytest.mark.parametrize("options", [{"resize": 0.0}, {"dx": float("nan")}, {"margin": -0.1}])
def test_bad_numbers(options: dict[str, float]) -> None:
    with pytest.raises(ac.ControlError, match="a layer"):
        ac.Layer(LEFT, **options)
