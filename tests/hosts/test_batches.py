"""Batches, several pictures per prompt, sizes and precisions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnctrl as ac
from attnctrl.controls import REGISTRY
from tests import tiny
from tests.methods import BINDING, CLASSIC, LIVELY
from tests.probes import REGIONS, Token
from tests.spies import watched

PROMPTS = ["a cat and a dog", "the red bird and a cat"]


PER_PROMPT = (
    REGIONS,
    (
        ac.Region("red bird", box=(0.1, 0.1, 0.9, 0.5)),
        ac.Region("cat", box=(0.0, 0.5, 1.0, 1.0)),
        ac.Region("the", box=(0.5, 0.0, 1.0, 1.0)),
    ),
)


def make(name: str, regions: Any) -> ac.Control:
    """The method for these regions, or for their phrases; with few descents, because they cost time."""
    entry = REGISTRY[name]
    few: dict[str, Any] = {name: 2 for name in ("iterations", "refinements", "rounds") if name in entry.params}
    if "regions" in entry.control.__dataclass_fields__:
        return entry.make(regions, **few)
    few |= LIVELY.get(name, {})
    if name in BINDING:
        own, other = BINDING[name]["pairs"], (("red", "bird"), ("the", "cat"))
        pairs = {REGIONS: own, PER_PROMPT: (own, other)}.get(regions, other)
        few |= BINDING[name] | {"pairs": pairs}
    return entry.make([r.phrase if isinstance(r, ac.Region) else [one.phrase for one in r] for r in regions], **few)


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(n) for n in numbers]


@pytest.mark.parametrize("method", CLASSIC)
def test_a_batch_of_prompts_gives_the_single_pictures(method: str) -> None:
    pipe = tiny.sd()
    with ac.control(pipe, make(method, PER_PROMPT)):
        batch = tiny.draw(pipe, PROMPTS, 2, generator=seeds(1, 2))
    for i, prompt in enumerate(PROMPTS):
        with ac.control(pipe, make(method, PER_PROMPT[i])):
            single = tiny.draw(pipe, prompt, 2, generator=seeds(i + 1))
        torch.testing.assert_close(batch[i : i + 1], single, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("model", [tiny.sd, tiny.sdxl])
def test_several_pictures_per_prompt(model: Any) -> None:
    pipe = model()
    controls = (ac.RegionMask(PER_PROMPT), ac.Refocus(PER_PROMPT, window=ac.Window(0.0, 0.1)))
    with ac.control(pipe, *controls) as run:
        batch = tiny.draw(pipe, PROMPTS, 2, num_images_per_prompt=2, generator=seeds(1, 2, 3, 4))
    assert len(run.losses[0].values) == 4
    for i, prompt in enumerate(PROMPTS):
        with ac.control(pipe, *(type(c)(PER_PROMPT[i], window=c.window) for c in controls)):
            pair = tiny.draw(pipe, prompt, 2, num_images_per_prompt=2, generator=seeds(2 * i + 1, 2 * i + 2))
        torch.testing.assert_close(batch[2 * i : 2 * i + 2], pair, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("latents", [(8, 16), (16, 4), (15, 22)])
@pytest.mark.parametrize("method", CLASSIC)
def test_sizes_that_are_not_square_or_even(method: str, latents: tuple[int, int]) -> None:
    pipe = tiny.sd()
    pipe.vae_scale_factor = 8  # as of real autoencoders; the picture itself is not decoded here
    size = (8 * latents[0], 8 * latents[1])
    stock = tiny.draw(pipe, steps=2, size=size)
    with ac.control(pipe, make(method, REGIONS), record=["cat"]) as run:
        drawn = tiny.draw(pipe, steps=2, size=size)
    assert drawn.shape[2:] == latents
    assert torch.isfinite(drawn).all()
    assert not torch.allclose(drawn, stock, atol=1e-3)
    # Halving rounds up: 15 x 22 has 8 x 11 below it, the coarser of the two levels and so nearer to 1/16.
    assert run.maps["cat"].shape[1:] == ((latents[0] + 1) // 2, (latents[1] + 1) // 2)


@pytest.mark.parametrize("method", CLASSIC)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, method: str) -> None:
    pipe = tiny.sd().to(dtype)
    stock = tiny.draw(pipe, steps=2)
    with ac.control(pipe, make(method, REGIONS), record=["cat"]) as run:
        drawn = tiny.draw(pipe, steps=2)
    assert drawn.dtype == dtype
    assert torch.isfinite(drawn).all()
    assert not torch.equal(drawn, stock)
    assert run.maps["cat"].dtype == torch.float32
    assert torch.isfinite(run.maps["cat"]).all()
    assert run.maps["cat"].max() > 0.01
    with ac.control(pipe):
        assert torch.equal(tiny.draw(pipe, steps=2), stock)


def test_half_precision_descends_like_single_precision() -> None:
    """A loss moves the latents by about as much in half precision: its gradient does not underflow."""
    moves = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        pipe = tiny.sd().to(dtype)
        latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
        control = Token(scale=20000.0, iterations=1)
        with ac.control(pipe, control), watched(pipe) as seen:
            tiny.draw(pipe, steps=1, latents=latents.clone())
        moves[dtype] = (seen.samples[0][:1].float() - latents.float()).flatten()
    single = moves[torch.float32]
    assert single.abs().max() > 0.1
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.cosine_similarity(moves[dtype], single, dim=0) > 0.95
        assert 0.9 < moves[dtype].norm() / single.norm() < 1.1
