"""Prompt-to-Prompt against its definition on materialised attention."""

from __future__ import annotations

import pytest
import torch

import attnctrl as ac
from attnctrl.controls.editing.alignment import aligned, common
from attnctrl.controls.editing.prompt_to_prompt import blend_mask
from attnctrl.prompt import Reader
from tests import tiny
from tests.editing.material import EDIT, LONGER, SOURCE, attention, call, draw, pair


def read(prompt: str) -> ac.prompt.PromptTokens:  # type: ignore[name-defined]
    return Reader(tiny.tokenizer()).read(prompt)


def test_common_words_by_hand() -> None:
    assert common("abcd", "xbcyd") == [(1, 1), (2, 2), (3, 4)]
    assert common("ab", "cd") == []
    assert common("", "a") == []


def test_replace_maps_word_to_word_and_the_rest_to_itself() -> None:
    passed, defined = aligned(read(SOURCE), read(EDIT), 24, "replace")
    assert torch.equal(passed, torch.eye(24))
    assert defined.all()
    # "the" has one token, "xyz" three: each of the three gets a third of the attention.
    passed, defined = aligned(read("a cat"), read("a xyz"), 24, "replace")
    assert passed[2, 2:5].tolist() == pytest.approx([1 / 3] * 3)
    assert passed[3, 5] == passed[4, 6] == 1.0  # the end and the padding behind it
    assert defined.all()


def test_refine_leaves_new_words_alone() -> None:
    passed, defined = aligned(read(SOURCE), read(LONGER), 24, "refine")
    assert (~defined).nonzero().flatten().tolist() == [2]  # "red"
    assert passed[2, 3] == passed[1, 1] == 1.0
    assert passed[:, 2].sum() == 0


def test_unequal_prompts_cannot_be_replaced() -> None:
    with pytest.raises(ac.ControlError, match=r"equally many words.*refine"):
        aligned(read(SOURCE), read(LONGER), 24, "replace")


@pytest.mark.parametrize(("prompt", "edit"), [(EDIT, "replace"), (LONGER, "refine")])
def test_moving_values_is_moving_columns(prompt: str, edit: str) -> None:
    """Against the definition: alpha * (A_source M) + (1 - alpha) * A_edit, times the values."""
    control = ac.PromptToPrompt(edit=edit, reweight={"dog": 2.0})
    state = control.begin(pair(prompt))
    given = call("cross")
    got = attention(control.inputs(given, state))
    maps = (given.query @ given.key.mT * given.scale).softmax(dim=-1)
    passed, defined = aligned(read(SOURCE), read(prompt), 24, edit)
    alpha = defined.float()
    mixed = (maps[0] @ passed) * alpha + maps[1] * (1 - alpha)
    weight = torch.ones(24)
    weight[list(pair(prompt).find("dog", 1))] = 2.0
    torch.testing.assert_close(got[1], (mixed * weight) @ given.value[1])
    torch.testing.assert_close(got[0], maps[0] @ given.value[0])


def test_after_its_part_of_the_run_only_the_weights_remain() -> None:
    control = ac.PromptToPrompt(cross_until=0.4, self_until=0.4, reweight={"dog": 0.5})
    state = control.begin(pair())
    late = call("cross", at=30)
    made = control.inputs(late, state)
    assert torch.equal(made.query, late.query)
    assert made.streams == ()
    assert torch.equal(made.value[0], late.value[0])
    assert not torch.equal(made.value[1], late.value[1])
    assert control.inputs(call("self", at=30), state).key is not None
    assert torch.equal(control.inputs(call("self", at=30), state).query, call("self", at=30).query)


def test_self_attention_is_the_sources() -> None:
    control = ac.PromptToPrompt(self_share=1.0)
    given = call("self")
    made = control.inputs(given, control.begin(pair()))
    assert torch.equal(made.query[1], given.query[0])
    assert torch.equal(made.key[1], given.key[0])
    assert torch.equal(made.value, given.value)


def test_blend_mask_by_hand() -> None:
    maps = torch.zeros(4, 4)
    maps[0, 0] = 1.0
    maps[3, 3] = 0.2
    inside = blend_mask(maps, 8, 8, 0.3)
    assert inside[:4, :4].all()  # two cells after the 3x3 maximum, doubled
    assert inside.sum() == 16


def test_equal_prompts_give_the_stock_picture() -> None:
    pipe = tiny.sd()
    stock = draw(pipe, [SOURCE, SOURCE])
    edited = draw(pipe, [SOURCE, SOURCE], ac.PromptToPrompt())
    assert torch.equal(edited[0], stock[0])
    torch.testing.assert_close(edited[1], stock[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [tiny.sd, tiny.sdxl])
def test_the_source_does_not_notice_its_edit(make) -> None:
    pipe = make()
    stock = draw(pipe, [SOURCE, LONGER])
    edited = draw(pipe, [SOURCE, LONGER], ac.PromptToPrompt(cross_until=1.0, self_until=1.0))
    assert torch.equal(edited[0], stock[0])
    assert not torch.allclose(edited[1], stock[1], atol=1e-4)


def test_outside_of_the_words_the_latents_are_the_sources() -> None:
    pipe = tiny.sd()
    edited = draw(pipe, [SOURCE, EDIT], ac.PromptToPrompt(blend=("cat", "bird"), threshold=0.9))
    same = torch.isclose(edited[0], edited[1]).all(dim=0)
    assert same.any()
    assert not same.all()


def test_several_pictures_of_each_prompt() -> None:
    pipe, start = tiny.sd(), torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    both = draw(pipe, [SOURCE, EDIT], ac.PromptToPrompt(), latents=start.repeat(2, 1, 1, 1), num_images_per_prompt=2)
    for i in range(2):
        alone = draw(pipe, [SOURCE, EDIT], ac.PromptToPrompt(), latents=start[i : i + 1].repeat(2, 1, 1, 1))
        torch.testing.assert_close(both[i::2], alone, atol=1e-4, rtol=1e-4)


def test_bad_input() -> None:
    with pytest.raises(ac.ControlError, match="source and its edit in one run"):
        draw(tiny.sd(), [SOURCE], ac.PromptToPrompt(), latents=None)
    with pytest.raises(ac.ControlError, match="blend names no word of the prompt"):
        draw(tiny.sd(), [SOURCE, EDIT], ac.PromptToPrompt(blend=("cat",)))
    with pytest.raises(ac.ControlError, match='"car" is not in the prompt'):
        draw(tiny.sd(), [SOURCE, EDIT], ac.PromptToPrompt(reweight={"car": 2.0}))
