"""Subjects: what is taken, what is refused; references as rows of a run; the three ways of placing them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import attnctrl as ac
from attnctrl.controls.subjects.owners import given_owners
from attnctrl.controls.subjects.rows import Look, References, reference_prompts, with_looks
from attnctrl.processors.attend import merge_streams
from attnctrl.schedule import Schedule
from attnctrl.sites import Call
from tests import tiny
from tests.methods import sampling
from tests.subjects.material import LEFT, PROMPT, call, draw, middle, picture, two


def test_pictures_of_any_mode_and_size() -> None:
    grey = Image.fromarray(np.full((10, 30), 128, np.uint8))
    one = ac.Subject("cat", [grey, picture(1), np.zeros((12, 9, 3))], strength=0.5)
    assert [r.picture.mode for r in one.references] == ["RGB"] * 3
    assert [r.picture.size for r in one.references] == [(30, 10), (32, 32), (9, 12)]
    assert one.references[0].fitted(2, 2).picture.size == (30, 30)
    assert one.references[0].fitted(2, 2).mask.getpixel((0, 9)) == 0
    assert one.references[0].tokens(3, 3).tolist() == [False] * 3 + [True] * 3 + [False] * 3


def test_transparency_is_the_mask() -> None:
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[:, 8:, 3] = 255
    one = ac.Subject("cat", Image.fromarray(pixels)).references[0]
    assert one.tokens(1, 2).tolist() == [False, True]
    assert one.picture.getpixel((0, 0)) == (255, 255, 255)
    assert one.picture.getpixel((15, 0)) == (0, 0, 0)


def test_a_thin_subject_does_not_vanish() -> None:
    mask = np.zeros((32, 32), bool)
    mask[20:22, 4:6] = True
    assert ac.Subject("cat", picture(1), mask).references[0].tokens(2, 2).tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"phrase": " ", "image": picture(1)}, "needs a phrase"),
        ({"phrase": "cat", "image": None}, "has no picture"),
        ({"phrase": "cat", "image": []}, "has no picture"),
        ({"phrase": "cat", "image": picture(1), "strength": -1.0}, "must be 0 or more"),
        ({"phrase": "cat", "image": picture(1, 4)}, "4x4 pixels shows nothing"),
        ({"phrase": "cat", "image": picture(1), "mask": np.zeros((32, 32))}, "mask is all zero"),
        ({"phrase": "cat", "image": Image.new("RGBA", (16, 16))}, "mask is all zero"),
        ({"phrase": "cat", "image": picture(1), "mask": np.ones((8, 32))}, "aspect ratio"),
        ({"phrase": "cat", "image": [picture(1)] * 2, "mask": [middle()]}, "1 masks for 2 pictures"),
        ({"phrase": "cat", "image": np.full((9, 9), 2.0)}, "outside 0..1"),
        ({"phrase": "cat", "image": picture(1), "region": (0.5, 0, 0.2, 1)}, "empty or reversed"),
    ],
)
def test_what_cannot_be_used_is_refused(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ac.ControlError, match=sentence):
        ac.Subject(**given)


def test_rows() -> None:
    many = [ac.Subject("cat", [picture(1), picture(2)]), ac.Subject("dog", picture(3), strength=0.0)]
    assert reference_prompts(many) == ["cat", "cat", "dog"]
    rows = References.of(sampling([PROMPT, PROMPT, "cat", "cat", "dog"], images=2), many, "it")
    assert rows.pictures == slice(0, 4)
    assert rows.shown == [(0, 0), (0, 1)]
    assert [rows.row(n) for n in range(3)] == [4, 6, 8]
    with pytest.raises(ac.ControlError, match="row of the run for each of 3 references"):
        References.of(sampling([PROMPT, "cat", "dog"]), many, "it")
    with pytest.raises(ac.ControlError, match="is not a subject"):
        References.of(sampling([PROMPT, "cat"]), ["cat"], "it")  # type: ignore[list-item]


def test_the_later_region_lies_on_top() -> None:
    one, other = ac.Subject("cat", picture(1), region=(0, 0, 1, 1)), ac.Subject("dog", picture(1), region=LEFT)
    assert given_owners([one, other], (1, 1, 2)).tolist() == [[False, True], [True, False]]


def attended(made: Call) -> torch.Tensor:
    """The output of a call, its own attention by definition."""
    scores = made.query @ made.key.mT * made.scale
    return merge_streams(made, scores.softmax(dim=-1) @ made.value, scores.logsumexp(dim=-1))


def by_hand(given: Call, row: int, seen: list[int], bias: float) -> torch.Tensor:
    """The first row's output if it saw these tokens of another row in one softmax with its own."""
    key = torch.cat([given.key[0], given.key[row, :, seen]], dim=1)
    value = torch.cat([given.value[0], given.value[row, :, seen]], dim=1)
    scores = given.query[0] @ key.mT * given.scale
    scores[:, :, 4:] += bias
    return scores.softmax(dim=-1) @ value


def test_the_bias_is_one_softmax() -> None:
    given, who = call(), torch.tensor([[True, True, False, False]])
    look = Look(2, torch.tensor([1, 3]), who, slice(0, 1), bias=0.7)
    made = attended(with_looks(given, [look], "bias"))
    plain = attended(given)
    torch.testing.assert_close(made[0, :, :2], by_hand(given, 2, [1, 3], 0.7)[:, :2])
    assert torch.equal(made[0, :, 2:], plain[0, :, 2:])
    assert torch.equal(made[1:], plain[1:])
    doubled = attended(with_looks(given, [replace(look, bias=0.0, strength=2.0)], "bias"))
    torch.testing.assert_close(doubled[0, :, :2], by_hand(given, 2, [1, 3], math.log(2))[:, :2])


def test_one_query_by_hand() -> None:
    """MagicFace's card: own logit 0, one reference key of logit 0 with w = ln 3: weights 1/4 and 3/4."""
    given = call(2)
    zero = torch.zeros_like(given.key)
    value = torch.zeros_like(given.value)
    value[1] = 1.0
    given = given.change(key=zero, value=value)
    looks = [Look(1, torch.tensor([0]), torch.ones(1, 4, dtype=torch.bool), slice(0, 1), bias=math.log(12))]
    # Four own keys weigh 4, the reference's one 12.
    torch.testing.assert_close(attended(with_looks(given, looks, "bias"))[0], torch.full_like(value[0], 0.75))


def test_gate_and_replacement() -> None:
    given, who = call(), torch.tensor([[True, True, False, False]])
    other = torch.tensor([[False, True, True, False]])
    looks = [
        Look(1, torch.tensor([0, 1]), who, slice(0, 1)),
        Look(2, torch.tensor([2]), other, slice(0, 1), strength=0.5),
    ]
    plain = attended(given)[0]

    def of(row: int, seen: list[int]) -> torch.Tensor:
        scores = given.query[0] @ given.key[row, :, seen].mT * given.scale
        return scores.softmax(dim=-1) @ given.value[row, :, seen]

    first, second = of(1, [0, 1]), of(2, [2])
    gated = attended(with_looks(given, looks, "gate"))[0]
    torch.testing.assert_close(gated[:, 0], (plain + first)[:, 0] / 2)
    torch.testing.assert_close(gated[:, 1], (plain + first + 0.5 * second)[:, 1] / 2.5)
    torch.testing.assert_close(gated[:, 3], plain[:, 3])
    placed = attended(with_looks(given, looks, "replace"))[0]
    torch.testing.assert_close(placed[:, 0], first[:, 0])
    torch.testing.assert_close(placed[:, 1], (first + 0.5 * second)[:, 1] / 1.5)
    torch.testing.assert_close(placed[:, 2], (plain + second)[:, 2] / 2)


def test_a_picture_with_the_references_queries_gets_what_the_reference_gets() -> None:
    given = call()
    query = given.query.clone()
    query[0] = query[1]
    given = given.change(query=query)
    look = Look(1, torch.arange(4), torch.ones(1, 4, dtype=torch.bool), slice(0, 1))
    torch.testing.assert_close(attended(with_looks(given, [look], "replace"))[0], attended(given)[1])


@pytest.mark.parametrize("how", ["bias", "gate", "replace"])
def test_looks_that_show_nothing_are_left_out(how: str) -> None:
    given = call()
    nobody, all_ = torch.zeros(1, 4, dtype=torch.bool), torch.ones(1, 4, dtype=torch.bool)
    looks = [
        Look(1, torch.tensor([0]), nobody, slice(0, 1)),
        Look(1, torch.tensor([], dtype=torch.long), all_, slice(0, 1)),
        Look(1, torch.tensor([0]), all_, slice(0, 1), strength=0.0),
    ]
    assert with_looks(given, looks, how) is given


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpm", "lcm"])
@pytest.mark.parametrize("kind", ["one", "fresh"])
def test_references_end_in_their_pictures(scheduler: str, kind: str) -> None:
    pipe, subjects = tiny.sd(scheduler), two(placed=False)
    seeds = {"generator": [torch.Generator().manual_seed(i) for i in range(3)]}
    stock = draw(pipe, subjects, latents=None, **seeds)
    seeds = {"generator": [torch.Generator().manual_seed(i) for i in range(3)]}
    keep = ac.DrawReferences(subjects, noise_kind=kind)
    drawn = draw(pipe, subjects, keep, latents=None, **seeds)
    torch.testing.assert_close(drawn[0], stock[0], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        pixels = pipe.image_processor.preprocess([picture(1), picture(2)], height=32, width=32)
        clean = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    assert torch.equal(drawn[1:], clean)


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpm", "lcm"])
def test_fresh_noise_is_the_schedulers_own(scheduler: str) -> None:
    made: Any = tiny.SCHEDULERS[scheduler]()
    made.set_timesteps(5)
    schedule = Schedule(made)
    now = schedule.step(float(made.timesteps[1]), 0)
    clean, noise = torch.randn(2, 1, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    wanted = made.add_noise(clean, noise, made.timesteps[2:3])
    torch.testing.assert_close(schedule.noised_next(clean, noise, now), wanted, atol=1e-5, rtol=1e-5)
    last = schedule.step(float(made.timesteps[1]), 3)
    assert torch.equal(schedule.noised_next(clean, noise, last), clean)


def test_a_trajectory_is_followed() -> None:
    pipe, subjects = tiny.sd(), two()
    path = torch.randn(4, 2, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    assert torch.equal(draw(pipe, subjects, ac.DrawReferences(subjects, trajectory=path))[1:], path[-1])
    with pytest.raises(ac.ControlError, match="trajectories of 1 references for 2"):
        draw(pipe, subjects, ac.DrawReferences(subjects, trajectory=path[:, :1]))
    with pytest.raises(ac.ControlError, match="with the steps and the size of the run"):
        draw(pipe, subjects, ac.DrawReferences(subjects, trajectory=path[1:]))


def test_no_subjects_no_change() -> None:
    pipe = tiny.sd()
    assert ac.DrawReferences().idle
    assert torch.equal(draw(pipe, (), ac.DrawReferences()), draw(pipe, ()))
