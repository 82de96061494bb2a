"""VFXMaster's mask against its card."""

from __future__ import annotations

import pytest
import torch

import attnctrl as ac
from attnctrl.controls.subjects.in_context_mask import State
from attnctrl.sites import Call, TokenLayout
from tests import tiny, wan
from tests.joint_models import SITE, on_joint_models
from tests.methods import sampling, step
from tests.parts import Tiny
from tests.subjects.material import PROMPT, call, draw, two
from tests.subjects.test_references import attended
from tests.transformers import draw as draw_joint

TEXT, LATENT = slice(0, 3), slice(3, 7)


def joint(rows: int = 2, seed: int = 0) -> Call:
    """A joint call of three text tokens and pictures of 2 x 2 latents."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, rows, 2, 7, 8, generator=generator)
    layout = TokenLayout(LATENT, TEXT, (1, 2, 2))
    return Call(SITE, step(0), "cond", query, key, value, 0.3, layout, layout)


def made(given: Call) -> torch.Tensor:
    control = ac.InContextMask(references=1)
    return attended(control.inputs(given, State(slice(0, 1), ((1, 0.0),))))


def perturbed(given: Call, row: int, part: slice) -> Call:
    key, value = given.key.clone(), given.value.clone()
    key[row, :, part], value[row, :, part] = 2.0, -3.0
    return given.change(key=key, value=value)


def test_it_is_the_published_mask() -> None:
    given = joint()
    key, value = (t.transpose(0, 1).flatten(1, 2) for t in (given.key, given.value))
    # Keys: prompt, latents, text of the reference, latents of the reference.
    for part, sees in ((TEXT, [1, 1, 1, 1]), (LATENT, [1, 1, 0, 1])):
        seen = torch.tensor(sees, dtype=torch.bool).repeat_interleave(torch.tensor([3, 4, 3, 4]))
        scores = given.query[0, :, part] @ key[:, seen].mT * given.scale
        torch.testing.assert_close(made(given)[0, :, part], scores.softmax(dim=-1) @ value[:, seen])
    assert torch.equal(made(given)[1], attended(given)[1])


def test_who_notices_what() -> None:
    given = joint()
    stock = made(given)
    of_target = made(perturbed(given, 0, LATENT))
    assert torch.equal(of_target[1], stock[1])
    of_text = made(perturbed(given, 1, TEXT))
    assert torch.equal(of_text[0, :, LATENT], stock[0, :, LATENT])
    assert not torch.allclose(of_text[0, :, TEXT], stock[0, :, TEXT])
    of_reference = made(perturbed(given, 1, LATENT))
    assert not torch.allclose(of_reference[0, :, LATENT], stock[0, :, LATENT])


def test_hidden_text_of_the_reference_stays_hidden() -> None:
    given = joint()
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    mask[1, ..., 2] = False
    given = given.change(mask=mask)
    control = ac.InContextMask(references=1)
    streams = control.inputs(given, State(slice(0, 1), ((1, 0.0),))).streams
    assert [None if s.mask is None else s.mask.flatten().tolist() for s in streams] == [[True] * 4, [True, True, False]]  # type: ignore[union-attr]


def test_separate_text_is_not_looked_at() -> None:
    given = call(2)
    control = ac.InContextMask(references=1)
    state = control.begin(sampling([PROMPT, "cat"]))
    key, value = (t.transpose(0, 1).flatten(1, 2) for t in (given.key, given.value))
    wanted = (given.query[0] @ key.mT * given.scale).softmax(dim=-1) @ value
    torch.testing.assert_close(attended(control.inputs(given, state))[0], wanted)


def only_the_first_changes(family: Tiny, other: str) -> None:
    pipe = family.make()

    def drawn(*controls: ac.Control) -> torch.Tensor:
        seeds = [torch.Generator().manual_seed(i) for i in range(2)]
        with ac.control(pipe, *controls, record=False):
            return draw_joint(pipe, family, [PROMPT, other], generator=seeds)

    stock, changed = drawn(), drawn(ac.InContextMask(references=1))
    torch.testing.assert_close(changed[1:], stock[1:], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(changed[0], stock[0], atol=1e-4)


@on_joint_models
def test_on_models_with_joint_attention(family: Tiny) -> None:
    only_the_first_changes(family, "a dog and a cat")


def test_on_clips() -> None:
    only_the_first_changes(wan.WAN["wan"], "a bird")


def test_pictures_of_subjects() -> None:
    pipe, subjects = tiny.sd(), two(placed=False)
    stock, drawn = draw(pipe, subjects), draw(pipe, subjects, ac.InContextMask(subjects))
    torch.testing.assert_close(drawn[1:], stock[1:], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(drawn[0], stock[0], atol=1e-3)
    nobody = two(strength=0.0)
    assert torch.equal(draw(pipe, nobody, ac.InContextMask(nobody)), draw(pipe, nobody))


def test_bad_input_is_a_sentence() -> None:
    with pytest.raises(ac.ControlError, match="2 references in a run of 2 prompts"):
        ac.InContextMask(references=2).begin(sampling([PROMPT, "cat"]))
    with pytest.raises(ac.ControlError, match="give one of the two"):
        ac.InContextMask(two(), references=1).begin(sampling([PROMPT, "cat", "dog"]))
