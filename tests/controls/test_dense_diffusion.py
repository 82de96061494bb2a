"""DenseDiffusion against its card."""

from __future__ import annotations

import pytest
import torch

import attnctrl as ac
from attnctrl.controls.layout.dense_diffusion import alike, decay, modulated
from attnctrl.sites import Call, Site, TokenLayout
from tests import tiny
from tests.methods import SITES, sampling, step
from tests.probes import REGIONS, Context
from tests.spies import COND, UNCOND, watch
from tests.transformers import FAMILIES, draw

INSIDE = torch.tensor([[[[True, False, False]]]])


def moved(values: list[float], inside: torch.Tensor, strength: float, touched: torch.Tensor | None = None) -> list:
    scores = torch.tensor([[[values]]], dtype=torch.float32)
    return modulated(scores, inside, torch.tensor([[[[strength]]]]), touched).flatten().tolist()


@pytest.mark.parametrize(
    ("strength", "expected"), [(0.0, [1, 2, 3]), (0.5, [2, 1.5, 2]), (1.0, [3, 1, 1])], ids=["0", "0.5", "1"]
)
def test_the_cards_case(strength: float, expected: list[float]) -> None:
    assert moved([1, 2, 3], INSIDE, strength) == expected


def test_keys_that_are_not_touched_keep_their_logits() -> None:
    touched = torch.tensor([True, True, False])
    assert moved([1, 2, 3], INSIDE, 1.0, touched) == [3, 1, 3]


def test_masked_logits_stay_masked_and_are_no_extreme() -> None:
    """The row's minimum is that of what may be seen, or everything outside would become -inf."""
    hidden = float("-inf")
    assert moved([1, 2, hidden], INSIDE, 1.0) == [2, 1, hidden]
    assert moved([hidden, 2, 3], INSIDE, 0.5) == [hidden, 2, 2.5]


def test_each_row_has_its_own_extremes() -> None:
    scores = torch.tensor([[[[1.0, 2.0, 3.0], [10.0, 0.0, 4.0]]]])
    inside = torch.tensor([[[[True, False, False], [False, True, False]]]])
    result = modulated(scores, inside, torch.tensor([[[[1.0], [0.5]]]]))
    assert result[0, 0].tolist() == [[3, 1, 1], [5, 5, 2]]


def test_the_gradient_is_that_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 2, 3, 5, dtype=torch.float64, generator=generator).requires_grad_(True)
    inside = torch.rand(1, 1, 3, 5, generator=generator) > 0.5
    strength = torch.rand(1, 1, 3, 1, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(lambda s: modulated(s, inside, strength), scores)


def test_the_decay() -> None:
    assert decay(1.0, 5) == 1.0
    assert decay(0.5, 5) == 0.03125
    assert decay(0.981, 5) == pytest.approx(0.91, abs=0.005)  # the card: tau ~ 0.91 at step 0, 0.17 at step 14
    assert decay(0.701, 5) == pytest.approx(0.17, abs=0.005)
    assert decay(0.3, 0) == 1.0


def apply(control: ac.DenseDiffusion, kind: str, grid: tuple[int, int], scores: torch.Tensor) -> torch.Tensor:
    """The control's edit of `scores` at noise 1 (tau = 1) on a sampling of "a cat and a dog"."""
    layout = TokenLayout.of_latents((1, *grid))
    site = SITES[0] if kind == "self" else SITES[1]
    keys = layout if kind == "self" else TokenLayout.of_text(24)
    none = torch.empty(0)
    call = Call(site, step(0), "cond", none, none, none, 1.0, layout, keys)
    return control.scores(scores, call, control.begin(sampling(grid=grid)))


@pytest.mark.parametrize("kind", ["self", "cross"])
def test_one_segment_over_all_pixels_changes_nothing(kind: str) -> None:
    """Its area is 1, so with full size adaptation the push is 0: the card's baseline."""
    whole = (ac.Region("a cat and a dog", box=(0, 0, 1, 1)),)
    scores = torch.randn(1, 2, 4, 4 if kind == "self" else 24, generator=torch.Generator().manual_seed(0))
    control = ac.DenseDiffusion(whole, self_weight=1.0)
    assert torch.equal(apply(control, kind, (2, 2), scores), scores)
    free = ac.DenseDiffusion(whole, self_weight=1.0, size_adaptation=0.0)
    assert not torch.equal(apply(free, kind, (2, 2), scores), scores)


def test_cross_attention_of_two_halves() -> None:
    """Pixels left, right of a 1 x 2 grid; each half has area 0.5, so that half the way is gone."""
    scores = torch.arange(24.0).expand(1, 1, 2, 24).clone()
    result = apply(ac.DenseDiffusion(REGIONS), "cross", (1, 2), scores)[0, 0]
    cat, dog = 2, 5
    assert result[0, cat] == cat + 0.5 * (23 - cat)
    assert result[0, dog] == dog - 0.5 * (dog - 0)
    assert result[1, cat] == cat - 0.5 * (cat - 0)
    assert result[1, dog] == dog + 0.5 * (23 - dog)
    free = [i for i in range(24) if i not in (cat, dog)]
    assert torch.equal(result[:, free], scores[0, 0][:, free])
    pushed = apply(ac.DenseDiffusion(REGIONS, free_tokens="push"), "cross", (1, 2), scores)[0, 0]
    torch.testing.assert_close(pushed[:, free], 0.5 * scores[0, 0][:, free])  # the code's form: toward the minimum 0


def test_self_attention_of_two_halves() -> None:
    scores = torch.tensor([[[[1.0, 3.0], [2.0, 6.0]]]])
    result = apply(ac.DenseDiffusion(REGIONS, self_weight=1.0), "self", (1, 2), scores)[0, 0]
    assert result.tolist() == [[1 + 0.5 * 2, 3 - 0.5 * 2], [2 - 0.5 * 0, 6 + 0.5 * 0]]


def test_pixels_of_no_segment() -> None:
    """A third of the pixels is covered: there the push is 1 - 1/3. Elsewhere words are pushed away with all force."""
    left = (ac.Region("cat", box=(0, 0, 1 / 3, 1)),)
    scores = torch.arange(24.0).expand(1, 1, 3, 24).clone()
    cross = apply(ac.DenseDiffusion(left), "cross", (1, 3), scores)[0, 0]
    torch.testing.assert_close(cross[:, 2], torch.tensor([2 + (2 / 3) * 21, 0.0, 0.0]))
    own = torch.arange(9.0).reshape(1, 1, 3, 3)
    kept = apply(ac.DenseDiffusion(left, self_weight=1.0), "self", (1, 3), own)[0, 0]
    assert torch.equal(kept[1:], own[0, 0, 1:])
    pushed = apply(ac.DenseDiffusion(left, self_weight=1.0, free_tokens="push"), "self", (1, 3), own)[0, 0]
    assert pushed[1:].tolist() == [[3, 3, 3], [6, 6, 6]]  # no pixel is of their segment: all to the row's minimum


def test_joint_attention_of_two_halves() -> None:
    """Latents left, right (rows 24, 25) behind 24 text tokens: each block is moved as if it stood alone."""
    where = sampling(grid=(1, 2))
    control = ac.DenseDiffusion(REGIONS, self_weight=1.0)
    latent, text = slice(24, 26), slice(0, 24)
    layout = TokenLayout(latent, text, (1, 1, 2))
    empty = torch.empty(1, 1, 26, 1)
    call = Call(Site("j", "joint", "", 0), step(0), "cond", empty, empty, empty, 1.0, layout, layout)
    scores = torch.randn(1, 2, 26, 26, generator=torch.Generator().manual_seed(0))
    before = scores.clone()
    result = control.scores(scores, call, control.begin(where))
    assert torch.equal(scores, before)
    assert torch.equal(result[:, :, text], before[:, :, text])
    cross = apply(control, "cross", (1, 2), before[:, :, latent, text])
    own = apply(control, "self", (1, 2), before[:, :, latent, latent])
    torch.testing.assert_close(result[:, :, latent, text], cross)
    torch.testing.assert_close(result[:, :, latent, latent], own)
    assert not torch.allclose(cross, before[:, :, latent, text])


def test_without_a_start_token_phrases_are_replaced_all_the_same() -> None:
    """T5 alone (FLUX), and T5 behind CLIP (SD3): each phrase gets what each encoder makes of it alone."""
    phrases = ["cat", "a dog"]
    regions = tuple(ac.Region(phrase, box=(i / 2, 0, i / 2 + 0.5, 1)) for i, phrase in enumerate(phrases))
    for name in ("flux", "sd3"):
        family, seen = FAMILIES[name], []
        keep = Context(by=0.0, got=seen)
        with ac.control(family.make(), keep, ac.DenseDiffusion(regions), keep, record=False) as run:
            draw(run.pipe, family, steps=1)
        (before, after), sampled = (text.positive[0] for text in seen[:2]), run.sampling
        changed = (before != after).any(dim=-1).nonzero().flatten().tolist()
        assert changed == sorted({*sampled.find("cat"), *sampled.find("a dog")})
        for phrase, alone in zip(phrases, sampled.encode(phrases).positive, strict=True):
            for encoder, single in zip(sampled.tokens[0], sampled.read([phrase])[0], strict=True):
                torch.testing.assert_close(after[list(encoder.find(phrase))], alone[list(single.find(phrase))])


def test_a_phrase_that_is_split_otherwise_alone() -> None:
    assert alike((1, 2, 3), 3) == [1, 2, 3]
    assert alike((1, 2), 4) == [1, 1, 2, 2]
    assert alike((5, 6, 7), 1) == [5]


def test_phrases_are_replaced_by_their_own_encoding() -> None:
    pipe = tiny.sd()
    regions = (ac.Region("a cat", box=(0, 0, 0.5, 1)), ac.Region("dog", box=(0.5, 0, 1, 1)))
    stock = watch(pipe, steps=1).texts[0]
    swapped = watch(pipe, ac.DenseDiffusion(regions), steps=1).texts[0]
    alone = {text: watch(pipe, prompt=text, steps=1).texts[0][COND][0] for text in ("a cat", "dog")}
    assert torch.equal(swapped[UNCOND], stock[UNCOND])
    row = swapped[COND][0]
    torch.testing.assert_close(row[[1, 2]], alone["a cat"][[1, 2]])
    torch.testing.assert_close(row[5], alone["dog"][1])
    rest = [i for i in range(24) if i not in (1, 2, 5)]
    assert torch.equal(row[rest], stock[COND][0][rest])
    kept = watch(pipe, ac.DenseDiffusion(regions, swap_phrases=False), steps=1).texts[0]
    assert torch.equal(kept, stock)


def test_repeated_phrases_share_one_encoding() -> None:
    pipe = tiny.sd()
    control = ac.DenseDiffusion((ac.Region("a cat", box=(0, 0, 0.5, 1)),))
    row = watch(pipe, control, prompt="a cat and a cat", steps=1).texts[0][COND][0]
    assert torch.equal(row[[1, 2]], row[[4, 5]])
    assert not torch.equal(row[1], row[2])
