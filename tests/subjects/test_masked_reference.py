"""DreamVideo-2's gate and CustomVideoX's biases against their cards."""

from __future__ import annotations

import math

import pytest
import torch

import attnctrl as ac
from attnctrl.controls.subjects.masked_reference import blended
from attnctrl.controls.subjects.time_aware_reference import parabola
from attnctrl.sites import Call
from tests import tiny
from tests.joint_models import on_joint_models
from tests.methods import sampling, step
from tests.parts import Tiny
from tests.subjects.material import PROMPT, call, draw, two
from tests.subjects.test_references import attended
from tests.transformers import draw as draw_joint

ROWS = [PROMPT, "cat", "dog"]
CAT, DOG = [0, 2], [1, 3]
MAKERS = (ac.MaskedReference, ac.TimeAwareReference)


def made(control: ac.Control, given: Call) -> torch.Tensor:
    return attended(control.inputs(given, control.begin(sampling(ROWS))))


def looked(given: Call, row: int, cells: list[int]) -> torch.Tensor:
    """What the picture gets of the subject in a row, moved to its own half."""
    scores = given.query[0] @ given.key[row][:, cells].mT * given.scale
    return scores.softmax(dim=-1) @ given.value[row][:, cells]


def with_other_dog(given: Call) -> Call:
    key, value = given.key.clone(), given.value.clone()
    key[2], value[2] = 7.0, -3.0
    return given.change(key=key, value=value)


def test_the_gate() -> None:
    assert blended(torch.tensor([True, False]), 0.75).tolist() == [1.0, 0.75]
    assert blended(torch.tensor([True, False]), 0.0).tolist() == [1.0, 0.0]
    assert blended(torch.tensor([True, False]), 1.0).tolist() == [1.0, 1.0]


def test_what_a_latent_gets_by_hand() -> None:
    given = call()
    own, cat, dog = attended(given)[0], looked(given, 1, CAT), looked(given, 2, DOG)
    got = made(ac.MaskedReference(two(), outside=0.5), given)[0]
    torch.testing.assert_close(got[:, CAT], ((own + cat + 0.5 * dog) / 2.5)[:, CAT])
    torch.testing.assert_close(got[:, DOG], ((own + 0.5 * cat + dog) / 2.5)[:, DOG])
    free = made(ac.MaskedReference(two(), outside=1.0), given)[0]
    torch.testing.assert_close(free, (own + cat + dog) / 3)


def test_a_hard_box_keeps_the_other_subject_out() -> None:
    control = ac.MaskedReference(two(), outside=0.0)
    given = call()
    first, second = made(control, given), made(control, with_other_dog(given))
    assert torch.equal(first[0, :, CAT], second[0, :, CAT])
    assert not torch.allclose(first[0, :, DOG], second[0, :, DOG])
    only = made(ac.MaskedReference((two()[0], two(strength=0.0)[1]), outside=0.0), given)
    assert torch.equal(only[0, :, DOG], attended(given)[0, :, DOG])


def test_the_parabola() -> None:
    weights = [parabola(step(i, 5), 0.5, 1.5) for i in range(5)]
    assert weights == pytest.approx([0.5, 1.25, 1.5, 1.25, 0.5])
    assert parabola(step(0, 1), 0.5, 1.5) == 1.5


def test_weights_by_hand() -> None:
    given = call(2)
    value = torch.zeros_like(given.value)
    value[1] = 1.0
    given = given.change(key=torch.zeros_like(given.key), value=value, step=step(0, 1))
    one = ac.TimeAwareReference(two()[:1], lowest=0.0, highest=3.0, entity_bias=math.log(2))
    got = attended(one.inputs(given, one.begin(sampling(ROWS[:2]))))
    # Four own keys of weight 1, two of the reference of weight 3, and of 6 for the cat's own latents.
    torch.testing.assert_close(got[0, :, DOG], torch.full_like(got[0, :, DOG], 0.6))
    torch.testing.assert_close(got[0, :, CAT], torch.full_like(got[0, :, CAT], 0.75))


def test_no_bias_is_concatenation_and_no_weight_nothing() -> None:
    given = call()
    flat = ac.TimeAwareReference(two(), lowest=1.0, highest=1.0, entity_bias=0.0)
    key, value = (torch.cat([t[0], t[1][:, CAT], t[2][:, DOG]], dim=1) for t in (given.key, given.value))
    wanted = (given.query[0] @ key.mT * given.scale).softmax(dim=-1) @ value
    torch.testing.assert_close(made(flat, given)[0], wanted)
    hidden = ac.TimeAwareReference(two(), lowest=0.0, highest=1.0)
    assert hidden.inputs(given, hidden.begin(sampling(ROWS))) is given  # the first step


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("placed", [True, False])
def test_references_stay_and_pictures_change(make: type[ac.Control], placed: bool) -> None:
    pipe, subjects = tiny.sd(), two(placed=placed)
    stock, drawn = draw(pipe, subjects), draw(pipe, subjects, make(subjects))
    torch.testing.assert_close(drawn[1:], stock[1:], atol=1e-4, rtol=1e-4)
    assert torch.isfinite(drawn).all()
    assert not torch.allclose(drawn[0], stock[0], atol=1e-3)
    both = draw(pipe, subjects, ac.MagicFace(subjects, from_layer=0.0), make(subjects))
    assert not torch.allclose(both[0], drawn[0], atol=1e-4)


@pytest.mark.parametrize("make", MAKERS)
def test_an_absent_subject_is_the_stock_run(make: type[ac.Control]) -> None:
    pipe, nobody = tiny.sd(), two(strength=0.0)
    assert make(nobody).idle
    assert torch.equal(draw(pipe, nobody, make(nobody)), draw(pipe, nobody))


@on_joint_models
@pytest.mark.parametrize("make", MAKERS)
def test_joint_attention(family: Tiny, make: type[ac.Control]) -> None:
    pipe, subjects = family.make(), two()

    def drawn(*controls: ac.Control) -> torch.Tensor:
        seeds = [torch.Generator().manual_seed(i) for i in range(3)]
        with ac.control(pipe, *controls, record=False):
            return draw_joint(pipe, family, ROWS, generator=seeds)

    stock, changed = drawn(), drawn(make(subjects))
    torch.testing.assert_close(changed[1:], stock[1:], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(changed[0], stock[0], atol=1e-4)
