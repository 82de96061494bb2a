"""SLiMe against its card: the losses by hand, and what a run learns and reads."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import attnctrl as ac
from attnctrl.controls.readout.segment_like_me import (
    by_cells,
    coarse_labels,
    map_loss,
    part_weights,
    rescaled,
    shares,
    spread_loss,
)
from tests import tiny
from tests.editing.material import picture
from tests.spies import watched
from tests.transformers import FAMILIES
from tests.transformers import draw as draw_family

LABELS = np.zeros((32, 32), dtype=int)
LABELS[8:16, 8:16] = 1
EVERY_STEP = ac.Window(0.0, 1.0)


def test_shares_are_among_the_parts() -> None:
    probs = torch.tensor([[[0.6, 0.1, 0.2, 0.1], [0.1, 0.0, 0.3, 0.6]]])
    expected = torch.tensor([[[0.75, 0.25], [0.25, 0.75]]])
    torch.testing.assert_close(shares(probs, torch.tensor([0, 2])), expected)


def test_labels_of_cells_are_those_that_cover_most() -> None:
    labels = torch.tensor([[0, 0, 1, 1], [0, 2, 1, 0], [2, 2, 0, 0], [2, 0, 0, 0]])
    assert coarse_labels(labels, 3, 2, 2).tolist() == [[0, 1], [2, 0]]


def test_rare_parts_weigh_more() -> None:
    labels = torch.tensor([[0, 0], [0, 1]])
    assert part_weights(labels, 3).tolist() == [1.0, 4.0, 0.0]


def test_the_loss_on_maps_by_hand() -> None:
    labels, weights = torch.tensor([[0, 0], [0, 1]]), torch.tensor([1.0, 4.0])
    half = torch.full((1, 2, 2, 2), 0.5)
    assert map_loss(half, labels, weights).item() == pytest.approx(math.log(2))
    right = torch.nn.functional.one_hot(labels, 2).permute(2, 0, 1)[None].float()
    assert map_loss(right, labels, weights).item() == pytest.approx(0, abs=1e-6)
    maps = right.clone()
    maps[0, :, 1, 1] = torch.tensor([0.9, 0.1])  # the rare part missed: weight 4 of 7
    assert map_loss(maps, labels, weights).item() == pytest.approx(-4 / 7 * math.log(0.1), rel=1e-5)
    assert spread_loss(right, labels).item() == 0
    assert spread_loss(half, labels).item() == pytest.approx(0.5)
    several = torch.cat([half, right])
    torch.testing.assert_close(map_loss(several, labels, weights), torch.tensor([math.log(2), 0.0]), atol=1e-5, rtol=0)


def test_the_mean_counts_cells_and_keeps_ranges() -> None:
    fine, coarse = torch.zeros(1, 1, 2, 2), torch.full((1, 1, 1, 1), 5.0)
    torch.testing.assert_close(by_cells([fine, coarse], 2, 2), torch.full((1, 1, 2, 2), 1.0))
    maps, like = torch.tensor([[[[0.2, 0.3, 0.4]]]]), torch.tensor([[[[0.9, 0.1, 0.5]]]])
    torch.testing.assert_close(rescaled(maps, like), torch.tensor([[[[0.1, 0.5, 0.9]]]]))


def test_gradients_are_those_of_finite_differences() -> None:
    maps = torch.rand(2, 2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
    labels = torch.tensor([[0, 1], [1, 0], [0, 0]])
    maps.requires_grad_(True)
    weights = torch.tensor([1.0, 3.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda m: map_loss(m, labels, weights), maps)
    assert torch.autograd.gradcheck(lambda m: spread_loss(m, labels), maps)


def test_it_learns_the_words_of_the_parts_alone() -> None:
    pipe = tiny.sd()
    learner = ac.SegmentLikeMe(LABELS, rate=0.3, iterations=4, window=ac.Window(0.0, 0.5))
    with ac.control(pipe, record=False), watched(pipe) as stock:
        tiny.draw(pipe, "a cat", steps=2, guidance_scale=1.0)
    held = ac.HoldPicture(picture())
    with ac.control(pipe, learner, held, record=False) as run, watched(pipe) as seen:
        tiny.draw(pipe, "a cat", steps=2, guidance_scale=1.0)
    moved = seen.texts[0] - stock.texts[0]
    assert moved[0, 1].abs().max() > 0.3  # place 1 is the first word, the one part's
    assert torch.equal(seen.texts[0][:, [0, *range(2, 24)]], stock.texts[0][:, [0, *range(2, 24)]])
    assert torch.equal(seen.texts[1], seen.texts[0])  # behind the window nothing moves
    values = [one.values[0] for one in run.losses]
    assert len(values) == 4
    assert values[-1] < values[0]
    torch.testing.assert_close(learner.words(run), seen.texts[1][0, 1:2])

    reader = ac.SegmentLikeMe(embeddings=learner.words(run), window=EVERY_STEP, presence=0.0)
    with ac.control(pipe, reader, ac.HoldPicture(picture()), record=False) as run, watched(pipe) as seen:
        tiny.draw(pipe, "a cat", steps=2, guidance_scale=1.0)
    torch.testing.assert_close(seen.texts[0][0, 1:2], learner_words(reader))
    labels = reader.read(run, (32, 32))
    assert labels.shape == (1, 32, 32)
    assert set(labels.unique().tolist()) <= {0, 1}
    absent = ac.SegmentLikeMe(embeddings=learner_words(reader), window=EVERY_STEP, presence=1.0)
    with ac.control(pipe, absent, record=False) as run:
        tiny.draw(pipe, "a cat", steps=1, guidance_scale=1.0)
    assert not absent.read(run, (32, 32)).any()  # no part ever gets all of the attention


def learner_words(reader: ac.SegmentLikeMe) -> torch.Tensor:
    assert reader.embeddings is not None
    return reader.embeddings


def test_bad_input_is_a_sentence() -> None:
    pipe = tiny.sd()
    for labels, sentence in (
        (LABELS.astype(float), "labels must be .height, width. integers"),
        (LABELS[0], "labels must be"),
        (np.zeros((4, 4), dtype=int), "up to 0"),
        (np.arange(36).reshape(6, 6), "35 parts do not fit 24 text tokens"),
    ):
        with pytest.raises(ac.ControlError, match=sentence), ac.control(pipe, ac.SegmentLikeMe(labels)):
            tiny.draw(pipe, steps=1)
    with (
        pytest.raises(ac.ControlError, match="acted nowhere"),
        ac.control(pipe, ac.SegmentLikeMe(LABELS, window=ac.Window(0.9, 0.95))),
    ):
        tiny.draw(pipe, steps=2)
    wrong = ac.SegmentLikeMe(embeddings=torch.zeros(1, 7))
    with pytest.raises(ac.ControlError, match=r"embeddings have the shape \(1, 7\)"), ac.control(pipe, wrong):
        tiny.draw(pipe, steps=1)
    reader = ac.SegmentLikeMe(embeddings=torch.zeros(1, 16))
    with ac.control(pipe, reader, record=False) as run:
        tiny.draw(pipe, steps=4, guidance_scale=1.0)
        with pytest.raises(ac.ControlError, match="has learned nothing"):
            reader.words(run)


@pytest.mark.parametrize("name", ["flux", "sd3", "sana"])
def test_other_families_learn_and_read(name: str) -> None:
    family = FAMILIES[name]
    pipe = family.make()
    # SANA's linear self-attention has no maps.
    weight = 0.0 if name == "sana" else 1.0
    learner = ac.SegmentLikeMe(LABELS, rate=0.1, iterations=4, spread_weight=weight, window=EVERY_STEP)
    with ac.control(pipe, learner, ac.HoldPicture(picture()), record=False) as run:
        draw_family(pipe, family, steps=2, free=True)
    values = [one.values[0] for one in run.losses if one.step == 0]
    assert len(values) == 4
    assert values[-1] < values[0]
    embeddings = learner.words(run)
    assert len(embeddings) == 1
    reader = ac.SegmentLikeMe(embeddings=embeddings, presence=0.0, window=EVERY_STEP)
    with ac.control(pipe, reader, ac.HoldPicture(picture()), record=False) as run:
        draw_family(pipe, family, steps=2, free=True)
    assert reader.read(run, (32, 32)).shape == (1, 32, 32)
