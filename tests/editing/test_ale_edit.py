"""ALE-Edit against its card."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import attnctrl as ac
from attnctrl.controls.editing.ale_edit import passed_on, restricted, spliced
from attnctrl.prompt import Reader
from tests import tiny
from tests.editing.material import SOURCE, attention, call, draw, pair
from tests.methods import step

LEFT, RIGHT = np.zeros((2, 32, 32), np.uint8)
LEFT[:, :16] = RIGHT[:, 16:] = 255
TARGET = "a bird and a cat"
EDITS = (ac.Edit("cat", "bird", LEFT), ac.Edit("dog", "cat", RIGHT))


def test_object_restricted_embeddings_by_hand() -> None:
    joint, single = torch.arange(8.0)[:, None], 100 + torch.arange(8.0)[:, None]
    alone = restricted(joint, single, [3, 4], 2, 6)
    assert alone.flatten().tolist() == [0, 0, 0, 101, 102, 0, 103, 104]
    assert spliced(joint, [single], [[3, 4]]).flatten().tolist() == [0, 1, 2, 101, 102, 5, 6, 7]


def test_columns_go_from_an_objects_words_to_those_that_replace_them() -> None:
    source, target = (Reader(tiny.tokenizer()).read(text) for text in (SOURCE, "a red bird and a cat"))
    passed = passed_on(source, target, 9, [([2], [2, 3]), ([5], [6])])
    expected = torch.zeros(9, 9)
    expected[2, [2, 3]] = 0.5  # cat -> red bird
    for before, after in ((0, 0), (1, 1), (3, 4), (4, 5), (5, 6), (6, 7), (7, 8)):
        expected[before, after] = 1
    assert torch.equal(passed, expected)
    assert torch.equal(passed_on(source, source, 9, [([2], [2])]), torch.eye(9))


def embedded(**options: float) -> tuple:
    """A control, its state, and a call whose values are the first channels of the embeddings."""
    control = ac.AleEdit(EDITS, **options)
    state = control.begin(pair(TARGET))

    def project(text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return text[:, None, :, :8], text[:, None, :, 8:].expand(-1, 2, -1, -1)

    return control, state, replace(call("cross"), project=project)


def test_at_first_an_edit_attends_as_its_source_does() -> None:
    for until, source in ((0.0, False), (0.5, True)):
        control, state, given = embedded(cross_until=until)
        made = control.inputs(given, state)
        for changed, own in ((made.query, given.query), (made.key, given.key)):
            assert torch.equal(changed[0], own[0])
            assert torch.equal(changed[1], own[0] if source else own[1])
    control, state, given = embedded(cross_until=0.5)
    late = control.inputs(replace(given, step=step(25)), state)
    assert torch.equal(late.query, given.query)


@pytest.mark.parametrize("until", [0.0, 0.8])
def test_another_objects_embedding_does_not_reach_into_a_mask(until: float) -> None:
    control, state, given = embedded(cross_until=until)
    before = attention(control.inputs(given, state))
    state.embeddings[1] += 5.0  # the object at the right
    after = attention(control.inputs(given, state))
    left, right = [0, 2], [1, 3]  # of the 2 x 2 latents
    assert torch.equal(after[1, :, left], before[1, :, left])
    assert not torch.allclose(after[1, :, right], before[1, :, right])
    assert torch.equal(after[0], before[0])


def test_an_objects_words_are_hidden_outside_its_mask() -> None:
    control, state, given = embedded()
    mask = control.inputs(given, state).mask
    assert mask is not None
    words = state.words[1]
    assert mask[0].all()
    assert mask[1, 0, [0, 2]][:, words[0]].all()
    assert not mask[1, 0, [1, 3]][:, words[0]].any()
    assert mask[1, 0][:, ~words.any(dim=0)].all()


def test_every_latent_belongs_to_one_object_or_the_background() -> None:
    both = np.full((32, 32), 255, np.uint8)
    state = ac.AleEdit((EDITS[0], ac.Edit("dog", "cat", both))).begin(pair(TARGET))
    inside = state.masks((1, 2, 2))
    assert (inside.sum(dim=0) == 1).all()
    assert inside[2].tolist() == [True, False, True, False]  # where both objects claim it


def test_the_source_does_not_notice_its_edit() -> None:
    pipe = tiny.sd()
    stock, edited = draw(pipe, [SOURCE, TARGET]), draw(pipe, [SOURCE, TARGET], ac.AleEdit(EDITS))
    assert torch.equal(edited[0], stock[0])
    assert not torch.allclose(edited[1], stock[1], atol=1e-4)


def test_bad_input() -> None:
    with pytest.raises(ac.ControlError, match='needs a mask for every edit: "cat" has none'):
        draw(tiny.sd(), [SOURCE, TARGET], ac.AleEdit((ac.Edit("cat", "bird"),)))
    with pytest.raises(ac.ControlError, match='the edit of "cat" has no words for it'):
        draw(tiny.sd(), [SOURCE, TARGET], ac.AleEdit((ac.Edit("cat", "", LEFT),)))
    with pytest.raises(ac.ControlError, match='"bird" is not in the prompt'):
        draw(tiny.sd(), [SOURCE, TARGET], ac.AleEdit((ac.Edit("bird", "cat", LEFT),)))
    with pytest.raises(ac.ControlError, match='"red" is not in the prompt'):
        draw(tiny.sd(), [SOURCE, TARGET], ac.AleEdit((ac.Edit("cat", "red", LEFT),)))
