"""PrimeComposer against its card."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import attnctrl as ac
from attnctrl.controls.editing.prime_composer import infused, placed
from attnctrl.pipelines import EditPipeline
from tests import tiny
from tests.editing.material import EDIT, SOURCE, call, draw, pair, picture
from tests.editing.test_sources import clean
from tests.joint_models import NAMES
from tests.spies import assert_restored, snapshot
from tests.transformers import FAMILIES
from tests.transformers import draw as draw_joint

SHAPE = np.zeros((32, 32), np.uint8)
SHAPE[8:16, 8:16] = 255
BOX = (0.5, 0.25, 0.75, 0.5)  # latents 8..12 across, 4..8 down
PATHS = [torch.stack([clean(seed) for seed in range(first, first + 4)]) for first in (0, 10)]


def composer(**options: Any) -> ac.PrimeComposer:
    return ac.PrimeComposer(picture(), SHAPE, options.pop("box", BOX), **{"trajectories": PATHS, **options})


def test_infusion_by_hand() -> None:
    """Four pixels, of which the third is the object's: its column is the prior's and its row the transposed column."""
    generator = torch.Generator().manual_seed(0)
    query, key, prior_query, prior_key = torch.randn(4, 1, 1, 4, 3, generator=generator)
    inside = torch.tensor([False, False, True, False]).view(1, 1, 4, 1)
    wide_query, wide_key = infused(query, key, prior_query, prior_key, inside)
    scores, prior = (wide_query @ wide_key.mT)[0, 0], (prior_query @ prior_key.mT)[0, 0]
    expected = (query @ key.mT)[0, 0].clone()
    expected[:, 2] = prior[:, 2]
    expected[2, :] = prior[:, 2]
    torch.testing.assert_close(scores, expected)
    nowhere = infused(query, key, prior_query, prior_key, torch.zeros_like(inside))
    assert torch.equal(nowhere[0] @ nowhere[1].mT, query @ key.mT)


def test_the_background_keeps_its_own_attention() -> None:
    control = composer(box=(0.5, 0.5, 1.0, 1.0))
    state, given = control.begin(pair()), call("self")
    assert state.inside[1, 2, 2].tolist() == [False, False, False, True]
    made = control.inputs(given, state)
    scores, own = made.query @ made.key.mT, given.query @ given.key.mT
    torch.testing.assert_close(scores[0], own[0])
    torch.testing.assert_close(scores[1, :, :, 3], own[0, :, :, 3])
    torch.testing.assert_close(scores[1, :, :3, :3], own[1, :, :3, :3])
    late = call("self", at=15)
    assert control.inputs(late, state) is late


def test_words_are_seen_in_the_silhouette_alone() -> None:
    control = composer(box=(0.5, 0.5, 1.0, 1.0), phrase="bird")
    state = control.begin(pair(EDIT))
    mask = control.inputs(call("cross"), state).mask
    assert mask is not None
    assert mask.shape == (2, 1, 4, 24)
    assert mask[0].all()
    hidden = (~mask[1, 0]).nonzero().tolist()
    assert hidden == [[0, 2], [1, 2], [2, 2]]  # "bird" is the second word
    assert composer().inputs(call("cross"), state).mask is None


def test_the_foreground_is_fitted_into_its_box() -> None:
    mask = Image.fromarray(SHAPE[:16, :24])  # 8 x 8 pixels at (8, 8)
    there = placed(mask, mask, (0.5, 0.0, 1.0, 0.25), (64, 64), Image.Resampling.NEAREST)
    assert there.getbbox() == (40, 0, 56, 16)  # 16 high, and in the middle of 32


def test_pictures_of_both_domains() -> None:
    source = Image.new("RGB", (32, 32), (10, 20, 30))
    back, pasted = composer().pictures(source)
    assert back is source
    inside = np.zeros((32, 32), bool)
    inside[8:16, 16:24] = True
    assert (np.asarray(pasted)[~inside] == (10, 20, 30)).all()
    assert np.array_equal(np.asarray(pasted)[inside], np.asarray(picture())[SHAPE > 0])
    _, alone = composer(domain="cross").pictures(source)
    assert np.array_equal(np.asarray(alone)[inside], np.asarray(pasted)[inside])
    assert not (np.asarray(alone)[~inside] == (10, 20, 30)).all()


SILHOUETTE = torch.zeros(16, 16, dtype=torch.bool)
SILHOUETTE[4:8, 8:12] = True


def test_latents_are_combined_step_by_step() -> None:
    """Held to the end, they are the background's with the foreground's inside; blended, the background's outside."""
    box = (0.5, 0.25, 1.0, 0.5)  # the object stands in its middle
    where = torch.zeros(16, 16, dtype=torch.bool)
    where[4:8, 8:16] = True
    shape = torch.zeros(16, 16, dtype=torch.bool)
    shape[4:8, 10:14] = True
    held = draw(tiny.sd(), [SOURCE, EDIT], composer(box=box, hold_until=1.0))
    assert torch.equal(held[1], torch.where(shape, PATHS[1][-1, 0], PATHS[0][-1, 0]))
    assert torch.equal(held[0], PATHS[0][-1, 0])
    blended = draw(tiny.sd(), [SOURCE, EDIT], composer(box=box, blend_until=1.0))
    assert torch.equal(blended[1][:, ~where], PATHS[0][-1, 0][:, ~where])
    assert not torch.isclose(blended[1][:, where], PATHS[0][-1, 0][:, where]).any()
    free = draw(tiny.sd(), [SOURCE, EDIT], composer(box=box, blend_until=0.5))
    assert not torch.isclose(free[1][:, ~where], PATHS[0][-1, 0][:, ~where]).all()


def test_the_prior_is_the_background_with_the_compositions_own_object() -> None:
    control, rows = composer(infuse_until=1.0, hold_until=0.0), []

    def keep(pipe: Any, index: int, timestep: Any, values: dict) -> dict:
        rows.append(values["latents"])
        return values

    draw(tiny.sd(), [SOURCE, EDIT], control, callback_on_step_end=keep)
    for index in (0, 1):
        first, second = rows[index]
        assert torch.equal(first[:, SILHOUETTE], second[:, SILHOUETTE])
        assert torch.equal(first[:, ~SILHOUETTE], PATHS[0][index + 1, 0][:, ~SILHOUETTE])
    assert torch.equal(rows[2][0], PATHS[0][3, 0])


def test_it_starts_from_noise_in_the_box() -> None:
    box = torch.zeros(16, 16, dtype=torch.bool)
    box[4:8, 8:16] = True
    shape = torch.zeros(16, 16, dtype=torch.bool)
    shape[4:8, 10:14] = True
    control = composer(box=(0.5, 0.25, 1.0, 0.5), seed=3)
    sampling = pair()
    sampling.latent_grid = (1, 16, 16)
    noise = control.noise(torch.zeros(2, 4, 16, 16), sampling, control.begin(sampling))
    fresh = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(3))
    assert torch.equal(noise[1], torch.where(shape, PATHS[1][0, 0], torch.where(box, fresh, PATHS[0][0, 0])))
    assert torch.equal(noise[0], torch.where(shape, PATHS[1][0, 0], PATHS[0][0, 0]))


def test_the_pipeline_makes_what_it_needs() -> None:
    pipe = tiny.sd()
    before, back = snapshot(pipe), Image.new("RGB", (32, 32), (90, 90, 90))
    control = ac.PrimeComposer(picture(), SHAPE, BOX, phrase="bird")
    result = EditPipeline(pipe)(back, SOURCE, EDIT, method=control, num_inference_steps=4, guidance=4.0)
    assert {row.point for row in result.run.report.rows.values() if row.control == "PrimeComposer"} == {
        "inputs",
        "noise",
        "latents",
    }
    stock = EditPipeline(pipe)(back, SOURCE, EDIT, method="none", num_inference_steps=4, guidance=4.0)
    assert result.reconstruction.tobytes() == stock.reconstruction.tobytes()
    assert result.images[0].tobytes() != stock.images[0].tobytes()
    assert_restored(before, pipe)


def test_it_works_beside_others() -> None:
    alone = draw(tiny.sd(), [SOURCE, EDIT], composer(infuse_until=1.0))
    both = draw(tiny.sd(), [SOURCE, EDIT], composer(infuse_until=1.0), ac.MutualSelfAttention(window=ac.Window()))
    assert torch.isfinite(both).all()
    assert not torch.allclose(both[1], alone[1], atol=1e-4)


@pytest.mark.parametrize(
    ("control", "prompts", "sentence"),
    [
        (composer(trajectories=None), [SOURCE, EDIT], "needs the trajectories of the background"),
        (composer(), [SOURCE, EDIT, EDIT], "not with 3 prompts"),
        (composer(phrase="car"), [SOURCE, EDIT], '"car"'),
        (composer(trajectories=[PATHS[0][:2], PATHS[1]]), [SOURCE, EDIT], "trajectory of 1 steps"),
        (ac.PrimeComposer("a file", SHAPE, BOX, trajectories=PATHS), [SOURCE, EDIT], "give a PIL picture"),
    ],
)
def test_bad_input(control: ac.Control, prompts: list[str], sentence: str) -> None:
    with pytest.raises(ac.ControlError, match=sentence):
        draw(tiny.sd(), prompts, control, latents=torch.zeros(len(prompts), 4, 16, 16))


def test_joint_attention_is_refused() -> None:
    family = FAMILIES[NAMES[0]]
    with (
        pytest.raises(ac.ControlError, match="use a UNet"),
        ac.control(family.make(), composer(), record=False) as run,
    ):
        draw_joint(run.pipe, family, [SOURCE, EDIT])
