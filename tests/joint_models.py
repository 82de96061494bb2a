"""Material for methods of joint attention: tiny sequences of text and latents, and the outputs of the first layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import attnctrl as ac
from attnctrl.controls.layout.entities import Entities
from attnctrl.kernels import TokenGroups
from attnctrl.sites import Call, Site, TokenLayout
from tests import tiny
from tests.hosts.test_batches import PER_PROMPT, PROMPTS, seeds
from tests.methods import sampling, step
from tests.parts import Tiny
from tests.probes import REGIONS, Output
from tests.transformers import FAMILIES, draw

JOINT = ac.Where(kinds=("joint",))
SITE = Site("block.attn", "joint", "", 0)
NAMES = ("flux", "sd3", "qwen")
on_joint_models = pytest.mark.parametrize("family", [FAMILIES[name] for name in NAMES], ids=NAMES)


def matrix(make: Any, regions: Any, prompts: Any = "a cat and a dog", blocks: int = 2, kept: int = 1) -> torch.Tensor:
    """What sees what under the groups of `make`, bool (batch, tokens, tokens).

    The sequence is one token of the prompt, `kept` of each of `blocks` regions, and latents of 2 x 2.
    """
    given = replace(sampling(prompts), sites=[SITE], text_tokens=1)
    entities = Entities.begin(given, regions, JOINT)
    text = 1 + kept * blocks
    layout = TokenLayout(slice(text, text + 4), slice(0, text), (1, 2, 2))
    empty = torch.empty(len(given.prompts or ()), 1, text + 4, 1)
    call = Call(SITE, step(0), "cond", empty, empty, empty, 1.0, layout, layout)
    groups = entities.mask(call, make)
    assert isinstance(groups, TokenGroups)
    return groups.dense()[:, 0]


def seen(picture: str) -> list[list[bool]]:
    """Rows of a picture of a matrix: "." is hidden, everything else seen; blanks only part the columns."""
    return [[c != "." for c in line.replace(" ", "")] for line in picture.strip().splitlines()]


def first_outputs(family: Tiny, control: ac.Control, branch: str = "cond", **kwargs: Any) -> torch.Tensor:
    """What the first layer gives under a control in the first step: (batch, heads, tokens, head_dim)."""
    pipe, outputs = family.make(), []
    keep = Output(edit=lambda output: (outputs.append(output), output)[1], where=JOINT, branches=(branch,))
    with ac.control(pipe, control, keep):
        draw(pipe, family, steps=1, **kwargs)
    return outputs[0]


def latent_rows(output: torch.Tensor, family: Tiny) -> torch.Tensor:
    """The part (batch, heads, latent tokens, head_dim) of a joint output: after the text, but before it in SD3."""
    count = family.grid[1] * family.grid[2]
    return output[:, :, :count] if family is FAMILIES["sd3"] else output[:, :, -count:]


def changed(one: torch.Tensor, other: torch.Tensor, family: Tiny) -> torch.Tensor:
    """bool (batch, height, width): the latent tokens whose outputs differ."""
    apart = ~torch.isclose(latent_rows(one, family), latent_rows(other, family), atol=1e-6).all(dim=(1, 3))
    return apart.unflatten(1, family.grid[1:])


def assert_batch_is_the_single_ones(family: Tiny, make: Callable[[Any], ac.Control]) -> None:
    """Prompts with regions of their own and two pictures each give in one batch what they give alone.

    For QwenImage texts of equal lengths: it pads shorter ones in a batch, which moves what stands behind them.
    """
    prompts, per_prompt = PROMPTS, PER_PROMPT
    if family is FAMILIES["qwen"]:
        prompts, per_prompt = [tiny.PROMPT, "a dog and a cat"], (REGIONS, (REGIONS[1], tall("cat")))
    pipe = family.make()
    negative = {"negative_prompt": ["a bird"] * 2} if "negative_prompt" in family.guided else {}
    with ac.control(pipe, make(per_prompt)):
        batch = draw(pipe, family, prompts, 2, num_images_per_prompt=2, generator=seeds(1, 2, 3, 4), **negative)
    for i, prompt in enumerate(prompts):
        with ac.control(pipe, make(per_prompt[i])):
            pair = draw(pipe, family, prompt, 2, num_images_per_prompt=2, generator=seeds(2 * i + 1, 2 * i + 2))
        torch.testing.assert_close(batch[2 * i : 2 * i + 2], pair, atol=1e-3, rtol=1e-3)


def tall(phrase: str) -> ac.Region:
    """A region in the middle of the upper three quarters."""
    return ac.Region(phrase, box=(0.25, 0.0, 0.75, 0.75))
