"""Whose each latent is: Otsu's threshold, the argmax of words, powers of self-attention, regions first."""

from __future__ import annotations

import torch

import attnctrl as ac
from attnctrl.controls.subjects.owners import Named, Owners, otsu, owned_by_argmax, owned_by_otsu, powered
from tests.methods import sampling, self_map, step
from tests.subjects.material import PROMPT, call, picture


def test_otsu_on_two_values_gives_these_back() -> None:
    values = torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0], [0.1, 0.2, 0.15, 0.8, 0.9]])
    assert (values > otsu(values)).tolist() == [[False, True, True, False, True], [False, False, False, True, True]]


def test_otsu_is_the_best_cut() -> None:
    values = torch.rand(40, generator=torch.Generator().manual_seed(2)) ** 3

    def between(cut: float) -> float:
        low, high = values[values <= cut], values[values > cut]
        return len(low) * len(high) * float(low.mean() - high.mean()) ** 2 if len(high) else 0.0

    best = max(values.tolist(), key=between)
    torch.testing.assert_close(otsu(values), torch.tensor([best]))


def test_powers_of_self_attention() -> None:
    attention = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.2, 0.6, 0.1, 0.1], [0.1, 0.1, 0.5, 0.3], [0.2, 0.2, 0.3, 0.3]])
    maps = torch.rand(1, 4, 3, generator=torch.Generator().manual_seed(1))
    wanted = 0.25 * attention @ maps + 0.75 * attention @ attention @ maps
    torch.testing.assert_close(powered([self_map(attention, (2, 2))], maps, (0.25, 0.75)), wanted)
    assert powered([], maps, (0.25,)) is maps


def test_the_words_compete() -> None:
    # Tokens: start, cat, "and", dog; four latents.
    maps = torch.tensor([[[0.1, 0.1, 0.1, 3.7], [2.0, 0.5, 0.5, 1.0], [0.5, 1.0, 0.5, 2.0], [0.2, 0.8, 2.5, 0.5]]])
    words = torch.tensor([[[False, True, False, False], [False, False, False, True]]])
    owned = owned_by_argmax(maps, words, 0.6)
    # The second latent is "dog" only since "and" counts 0.6; the last one is the background's.
    assert owned[0].tolist() == [[True, False, False, False], [False, True, True, False]]
    assert owned_by_argmax(maps, words, 1.0)[0].tolist() == [[True, False, False, False], [False, False, True, False]]


def test_otsu_gives_each_latent_one_owner() -> None:
    maps = torch.zeros(1, 3, 4)
    maps[0, 1], maps[0, 2] = torch.tensor([1.0, 0.9, 0.0, 0.0]), torch.tensor([0.0, 2.0, 1.9, 0.0])
    words = torch.tensor([[[False, True, False], [False, False, True]]])
    assert owned_by_otsu(maps, words)[0].tolist() == [[True, False, False, False], [False, True, True, False]]


def test_regions_come_first_and_attention_is_the_step_befores() -> None:
    placed = ac.Subject("cat", picture(1), region=(0, 0, 1, 0.5))
    owners = Owners.begin(sampling(PROMPT), [placed, Named("dog")], 1, "it")
    assert owners.at((1, 2, 2))[0].tolist() == [[True, True, False, False], [False] * 4]
    dog = int(owners.words[0, 1].nonzero())
    made = call(1, "cross")
    # Every latent in the left column attends to the dog.
    key = torch.zeros_like(made.key)
    key[:, :, dog] = 50.0
    query = torch.ones_like(made.query) * torch.tensor([1.0, -1.0, 1.0, -1.0])[None, None, :, None]
    made = made.change(key=key, query=query)
    owners.watch(made)
    assert not owners.at((1, 2, 2))[0, 1].any()
    owners.watch(made.change(branch="uncond", step=step(1)))
    assert not owners.at((1, 2, 2))[0, 1].any()
    owners.watch(made.change(step=step(1)))
    assert owners.at((1, 2, 2))[0].tolist() == [[True, True, False, False], [False, False, True, False]]
