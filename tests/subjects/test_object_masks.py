"""Through-The-Mask's masked attention against its card."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import attnctrl as ac
from attnctrl.controls.subjects.object_masks import ObjectMasks, apart, key_frames, tracked
from attnctrl.sites import Call, TokenLayout
from tests import tiny, wan
from tests.methods import sampling
from tests.subjects.material import LEFT, PROMPT, RIGHT, call
from tests.subjects.test_references import attended
from tests.transformers import draw as draw_clip

CAT, DOG = [0, 2], [1, 3]
WHOLE = (0.0, 0.0, 1.0, 1.0)


def regions(second: str = "a dog") -> tuple[ac.Region, ac.Region]:
    return ac.Region("cat", box=LEFT, prompt="a cat"), ac.Region("dog", box=RIGHT, prompt=second)


def projected(context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a text: its channels, in two heads."""
    heads = context.unflatten(-1, (2, 8)).transpose(1, 2)
    return heads * 0.01, heads.cos()


def output(control: ac.Control, given: Call) -> torch.Tensor:
    state = control.begin(sampling([PROMPT], grid=given.queries.grid[1:]))  # type: ignore[index]
    return control.output(attended(given), given, state)


def text_call() -> Call:
    given = call(1, "cross")
    key, value = projected(sampling([PROMPT]).encode([PROMPT]).positive)
    return given.change(project=projected, key=key, value=value)


def test_key_frames() -> None:
    assert [list(key_frames(f, 2, 4)) for f in range(2)] == [[0, 1], [2, 3]]
    assert [list(key_frames(f, 4, 2)) for f in range(4)] == [[0], [0], [1], [1]]
    assert [list(key_frames(f, 3, 2)) for f in range(3)] == [[0], [0, 1], [1]]


def test_a_track_that_ends() -> None:
    frames = [[ac.Region("cat", box=LEFT)], [ac.Region("cat", box=RIGHT), ac.Region("dog", box=LEFT)], []]
    found = tracked(["cat", "dog"], frames, (3, 1, 2))
    assert found.int().tolist() == [[1, 0, 0, 1, 0, 0], [0, 0, 1, 0, 0, 0]]
    assert apart(found[None]).int().tolist()[0][3:] == [[1, 0, 0], [0, 0, 1], [0, 0, 1]]


@pytest.mark.parametrize("kind", ["cross", "self"])
def test_one_object_that_is_everything_changes_nothing(kind: str) -> None:
    whole = (ac.Region("cat", box=WHOLE, prompt=PROMPT),)
    given = text_call() if kind == "cross" else call(1)
    got = output(ObjectMasks(whole, cross_weight=1.0, self_weight=1.0), given)
    torch.testing.assert_close(got, attended(given))


def test_each_object_sees_its_own_prompt() -> None:
    given = text_call()
    first, other = (output(ObjectMasks(regions(text), cross_weight=1.0), given) for text in ("a dog", "a red dog"))
    assert torch.equal(first[:, :, CAT], other[:, :, CAT])
    assert not torch.allclose(first[:, :, DOG], other[:, :, DOG])
    key, value = projected(sampling([PROMPT]).encode(["a cat"]).positive)
    wanted = (given.query @ key.mT * given.scale).softmax(dim=-1) @ value
    torch.testing.assert_close(first[:, :, CAT], wanted[:, :, CAT])
    half = output(ObjectMasks(regions(), cross_weight=0.5), given)
    torch.testing.assert_close(half, (first + attended(given)) / 2)


def test_nobodys_latents_keep_their_text() -> None:
    given = text_call()
    got = output(ObjectMasks(regions()[:1], cross_weight=1.0), given)
    assert torch.equal(got[:, :, DOG], attended(given)[:, :, DOG])
    assert not torch.allclose(got[:, :, CAT], attended(given)[:, :, CAT])


def test_each_object_sees_itself_in_all_frames() -> None:
    frames = [[ac.Region("cat", box=LEFT)], [ac.Region("cat", box=RIGHT)], []]
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 6, 8, generator=generator)
    layout = TokenLayout.of_latents((3, 1, 2))
    given = call(1).change(query=query, key=key, value=value, queries=layout, keys=layout)
    control = ObjectMasks(tracks=frames, self_weight=1.0)
    state = control.begin(replace(sampling([PROMPT], grid=(1, 2)), latent_grid=(3, 1, 2)))
    got = control.output(attended(given), given, state)
    groups = ([0, 3], [1, 2, 4, 5])
    for tokens in groups:
        scores = query[:, :, tokens] @ key[:, :, tokens].mT * given.scale
        torch.testing.assert_close(got[:, :, tokens], scores.softmax(dim=-1) @ value[:, :, tokens])


def drawn(pipe: Any, *controls: ac.Control) -> torch.Tensor:
    with ac.control(pipe, *controls, record=False):
        return tiny.draw(pipe, PROMPT)


def test_on_a_unet() -> None:
    pipe = tiny.sd()
    control = ObjectMasks(regions(), window=ac.Window())
    alone = drawn(pipe, control)
    assert torch.isfinite(alone).all()
    assert not torch.allclose(alone, drawn(pipe), atol=1e-4)
    both = drawn(pipe, ac.RegionMask(regions()), control)
    assert not torch.allclose(both, alone, atol=1e-4)
    with ac.control(pipe, ObjectMasks([regions(), ()], window=ac.Window()), record=False):
        batch = tiny.draw(pipe, [PROMPT, PROMPT], latents=torch.zeros(2, 4, 16, 16))
    torch.testing.assert_close(batch[1:], tiny.draw(pipe, [PROMPT], latents=torch.zeros(1, 4, 16, 16)))


def test_tracks_of_a_clip() -> None:
    family = wan.WAN["wan"]
    pipe = family.make()

    def clip(*controls: ac.Control) -> torch.Tensor:
        with ac.control(pipe, *controls, record=False):
            return draw_clip(pipe, family, PROMPT)

    frames = [[ac.Region("cat", box=LEFT)], [ac.Region("cat", box=RIGHT)], []]
    moving, still = clip(ObjectMasks(tracks=frames)), clip(ObjectMasks(frames[0]))
    assert torch.isfinite(moving).all()
    assert not torch.allclose(moving, still, atol=1e-5)
    assert not torch.allclose(moving, clip(), atol=1e-5)


def test_nothing_to_do_and_bad_input() -> None:
    pipe = tiny.sd()
    for control in (
        ObjectMasks(()),
        ObjectMasks(regions(), cross_weight=0.0, self_weight=0.0),
        ObjectMasks(tracks=[[]]),
    ):
        assert control.idle
        assert torch.equal(drawn(pipe, control), drawn(pipe))
    with pytest.raises(ac.ControlError, match="give one of the two"):
        drawn(pipe, ObjectMasks(regions(), tracks=[regions()]))
    with pytest.raises(ac.ControlError, match="at most 63"):
        drawn(pipe, ObjectMasks([regions()[0]] * 64))
