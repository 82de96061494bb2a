"""Correspondence against its card: the bump and the peak by hand, and what a run learns and reads."""

from __future__ import annotations

import math

import pytest
import torch

import attnctrl as ac
from attnctrl.controls.readout.correspond import bump, peak
from attnctrl.sites import Call
from tests import tiny
from tests.editing.material import picture
from tests.probes import Inputs
from tests.spies import watched

EVERY_STEP = ac.Window(0.0, 1.0)


def test_the_bump() -> None:
    found = bump((0.375, 0.625), 0.25, 4, 4)  # the centre of column 1, row 2; one cell is sigma
    assert found[2, 1].item() == 1.0
    assert found[2, 2].item() == pytest.approx(math.exp(-0.5))
    assert found[1, 1].item() == pytest.approx(math.exp(-0.5))
    assert found[1, 2].item() == pytest.approx(math.exp(-1.0))
    wide = bump((0.5, 0.5), 0.25, 2, 8)
    assert wide.shape == (2, 8)
    assert wide[0, 3].item() == pytest.approx(math.exp(-((1 / 16) ** 2 + 0.25**2) / (2 * 0.0625)))


def test_the_peak() -> None:
    maps = torch.zeros(2, 4, 8)
    maps[0, 3, 1] = maps[1, 0, 7] = 1
    assert peak(maps) == [(0.1875, 0.875), (0.9375, 0.125)]
    assert peak(maps.flip(-1))[0] == (1 - 0.1875, 0.875)


def test_every_attempt_learns_its_own_text() -> None:
    pipe = tiny.sd()
    learner = ac.Correspond((0.3, 0.4), rate=0.05, iterations=4, window=ac.Window(0.0, 0.5))
    held = ac.HoldPicture(picture())
    with ac.control(pipe, learner, held, record=False) as run, watched(pipe) as seen:
        tiny.draw(pipe, "", steps=2, guidance_scale=1.0, num_images_per_prompt=2)
    start = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(0))
    moved = (seen.texts[0] - start).abs()
    assert (moved.amax(dim=-1) > 0).all()  # all tokens compete, so all are moved
    assert moved.max() < 4 * 0.05 * 1.5
    torch.testing.assert_close(learner.words(run), seen.texts[1])
    first, last = run.losses[0].values, run.losses[-1].values
    assert all(b < a for a, b in zip(first, last, strict=True))

    reader = ac.Correspond(embeddings=learner.words(run), window=EVERY_STEP)
    with ac.control(pipe, reader, held, record=False) as run, watched(pipe) as seen:
        tiny.draw(pipe, "", steps=2, guidance_scale=1.0, num_images_per_prompt=2)
    assert reader.embeddings is not None
    torch.testing.assert_close(seen.texts[0], reader.embeddings)
    x, y = reader.read(run, (32, 32))
    assert 0 < x < 1
    assert 0 < y < 1


def test_reading_is_the_peak_of_the_mean_map() -> None:
    pipe, coarse = tiny.sd(), ac.Where(near=1 / 16)
    texts = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(1))
    reader = ac.Correspond(embeddings=texts, window=EVERY_STEP, where=coarse)
    kept: dict[tuple[int, str], torch.Tensor] = {}

    def keep(call: Call) -> Call:
        probs = (call.query @ call.key.mT * call.scale).softmax(dim=-1).mean(dim=1)
        kept[call.step.index, call.site.name] = probs[..., 1].mean(dim=0)  # of the first word, over attempts
        return call

    with ac.control(pipe, reader, Inputs(edit=keep, where=coarse), record=False) as run:
        tiny.draw(pipe, "", steps=2, guidance_scale=1.0, num_images_per_prompt=2)
    mean = torch.stack(list(kept.values())).mean(dim=0).reshape(1, 8, 8)
    assert len(kept) == 8
    assert reader.read(run, (8, 8)) == peak(mean)[0]


def test_bad_input_is_a_sentence() -> None:
    pipe = tiny.sd()
    with (
        pytest.raises(ac.ControlError, match=r"give \(x, y\) in fractions"),
        ac.control(pipe, ac.Correspond((1.2, 0.5))),
    ):
        tiny.draw(pipe, steps=1)
    wrong = ac.Correspond(embeddings=torch.zeros(1, 7, 16))
    with pytest.raises(ac.ControlError, match=r"embeddings have the shape \(1, 7, 16\)"), ac.control(pipe, wrong):
        tiny.draw(pipe, steps=1)
