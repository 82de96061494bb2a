"""IR-Diffusion against its card."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnctrl as ac
from attnctrl.controls.subjects.isolation_reposition import isolated, moved
from attnctrl.kernels import TokenGroups, masked_attention
from tests import tiny
from tests.methods import sampling
from tests.subjects.material import PROMPT, call, draw, picture, two
from tests.subjects.test_references import attended


def ir(subjects: tuple[ac.Subject, ...], **params: Any) -> ac.Control:
    return ac.IsolationReposition(subjects, from_layer=0.0, **params)


def test_a_box_of_two_cells_a_side_over_one_of_four() -> None:
    reference, target = torch.zeros(2, 4, 4, dtype=torch.bool)
    reference[1:3, 2:4] = True
    target[:, :] = True
    wanted = [[6, 6, 7, 7], [6, 6, 7, 7], [10, 10, 11, 11], [10, 10, 11, 11]]
    assert moved(reference, target).view(4, 4).tolist() == wanted
    assert moved(target, reference).tolist() == [0, 2, 8, 10]
    assert moved(target, target).tolist() == list(range(16))


def test_what_is_not_the_subjects_is_not_shown() -> None:
    corner = torch.tensor([[True, True], [True, False]])
    assert moved(corner, torch.ones(2, 2, dtype=torch.bool)).tolist() == [0, 1, 2]
    nothing = torch.zeros(2, 2, dtype=torch.bool)
    assert len(moved(nothing, corner)) == len(moved(corner, nothing)) == 0


def test_isolation() -> None:
    owned = torch.tensor([[[True, False, False], [False, True, False]]])
    groups = TokenGroups.from_members(*isolated(owned))
    assert groups.dense()[0, 0].tolist() == [[True, False, True], [False, True, True], [True, True, True]]


def test_an_isolated_subject_does_not_notice_the_other() -> None:
    control = ir(two(), mutual=0.0)
    state = control.begin(sampling([PROMPT, "cat", "dog"]))
    given = call()
    groups = control.mask(given, state)
    assert isinstance(groups, TokenGroups)
    value = given.value.clone()
    value[0, :, [1, 3]] = 9.0  # the dog's latents
    before, after = (masked_attention(given.query, given.key, v, groups, 0.3) for v in (given.value, value))
    assert torch.equal(before[0, :, [0, 2]], after[0, :, [0, 2]])
    assert not torch.allclose(before[0, :, [1, 3]], after[0, :, [1, 3]])
    assert control.mask(given, ir(two()[:1]).begin(sampling([PROMPT, "cat"]))) is None


def test_the_other_reference_does_not_reach_it_either() -> None:
    control = ir(two(), keep=1.0, mutual=0.0)
    state = control.begin(sampling([PROMPT, "cat", "dog"]))
    given = call()
    key = given.key.clone()
    key[2] = 7.0
    first, second = (attended(control.inputs(one, state)) for one in (given, given.change(key=key)))
    assert torch.equal(first[0, :, [0, 2]], second[0, :, [0, 2]])
    assert not torch.allclose(first[0, :, [1, 3]], second[0, :, [1, 3]])


def test_latents_are_drawn_anew_in_every_step() -> None:
    control = ac.IsolationReposition(two(), keep=0.5)
    mine = torch.ones(64, dtype=torch.bool)
    kept = [control._kept(mine, at, 0) for at in (0, 0, 1)]
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])
    assert 16 < int(kept[0].sum()) < 48
    lonely = torch.zeros(64, dtype=torch.bool)
    lonely[5] = True
    assert all(control._kept(lonely, at, 0)[5] for at in range(8))


def test_mutual_attention_is_to_the_references_prompt() -> None:
    control = ir(two(), mutual=0.9)
    state = control.begin(sampling([PROMPT, "cat", "dog"]))
    given = call(kind="cross")
    made, plain = attended(control.inputs(given, state)), attended(given)
    scores = given.query[0] @ given.key[1].mT * given.scale
    other = scores.softmax(dim=-1) @ given.value[1]
    torch.testing.assert_close(made[0, :, [0, 2]], (0.1 * plain[0] + 0.9 * other)[:, [0, 2]])
    assert torch.equal(made[1:], plain[1:])
    assert control.begin(sampling([PROMPT, "cat", "dog"])).owners.watches is False


@pytest.mark.parametrize("placed", [True, False])
def test_references_stay_and_pictures_change(placed: bool) -> None:
    pipe, subjects = tiny.sd(), two(placed=placed)
    stock, drawn = draw(pipe, subjects), draw(pipe, subjects, ir(subjects))
    torch.testing.assert_close(drawn[1:], stock[1:], atol=1e-4, rtol=1e-4)
    assert torch.isfinite(drawn).all()
    assert not torch.allclose(drawn[0], stock[0], atol=1e-3)


def test_asked_for_nothing_it_is_the_stock_run() -> None:
    pipe, subjects = tiny.sd(), two()
    stock = draw(pipe, subjects)
    nothing = ir(subjects, keep=0.0, isolate_until=0.0, mutual=0.0)
    assert nothing.idle
    assert torch.equal(draw(pipe, subjects, nothing), stock)
    absent = two(strength=0.0)
    assert torch.equal(draw(pipe, absent, ir(absent)), stock)
    # One subject has nobody to be isolated from.
    alone = (ac.Subject("cat", picture(1)),)
    only = draw(pipe, alone, ir(alone, keep=0.0, mutual=0.0))
    torch.testing.assert_close(only, draw(pipe, alone), atol=1e-4, rtol=1e-4)
