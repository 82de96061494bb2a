"""Native nodes beside each other, beside other nodes, and where they decline, in a stand-in for ComfyUI."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from attnctrl.controls import REGISTRY
from attnctrl.errors import ControlError
from attnctrl.nodes import native
from attnctrl.nodes.catalog import NODES
from attnctrl.nodes.pictures import heat_maps
from attnctrl.nodes.places import region
from tests.nodes import host
from tests.nodes.helpers import BOX, NODE, apply, noise, replacing

# what holds for all ------------------------------------------------------------------------------------------------
NOTHING: dict[str, dict[str, Any]] = {
    "AttnCtrlRegionMask": {"weight": 0.0, "boost": 0.0},
    "AttnCtrlRegionPrompts": {"base_ratio": 1.0},
    "AttnCtrlDenseDiffusion": {"cross_weight": 0.0, "self_weight": 0.0},
    "AttnCtrlSoftPAG": {"scale": 0.0},
    "AttnCtrlRadial": {},
    "AttnCtrlDraft": {},
    "AttnCtrlNeighborhoodTiles": {},
}


@pytest.mark.parametrize("name", [n.id for n in NODES if n.category == native.CATEGORY and n.method])
def test_nothing_asked_for_is_the_stock_model_bit_for_bit(name: str, words: Any, positive: Any, negative: Any) -> None:
    with_regions = any(p.name == "regions" for p in NODE[name].inputs)
    about = {"regions": region("red circle", **BOX)[0], "words": words} if with_regions else {}
    base = host.unet()
    stock = host.sample(base, noise(), positive, negative)
    # What is done to the prompt holds in every step, whatever the window.
    late = {"window_start": 0.99} | ({"swap_phrases": False} if name == "AttnCtrlDenseDiffusion" else {})
    cases = [NOTHING[name], {"window_start": 0.5, "window_end": 0.5}, late]
    cases += [{"regions": ()}] if with_regions else []
    for nothing in cases:
        model = apply(name, base, **{**about, **nothing})
        if nothing or with_regions:
            assert torch.equal(host.sample(model, noise(), positive, negative), stock), nothing
    assert torch.equal(host.sample(base, noise(), positive, negative), stock)


def test_the_given_model_stays_as_it_is_and_a_patched_one_starts_anew(words: Any, positive: Any, negative: Any) -> None:
    base = host.unet()
    stock = host.sample(base, noise(), positive, negative)
    model = apply("AttnCtrlRegionMask", base, regions=region("red circle", **BOX)[0], words=words)
    first = host.sample(model, noise(), positive, negative)
    assert not torch.equal(first, stock)
    # Another size in between leaves nothing behind.
    host.sample(model, noise(16, 8), positive, negative)
    assert torch.equal(host.sample(model, noise(), positive, negative), first)
    assert torch.equal(host.sample(base, noise(), positive, negative), stock)
    assert base.wrappers == {}
    assert base.model_options == {"transformer_options": {}}


def test_only_the_conditional_rows_change(words: Any, positive: Any, negative: Any) -> None:
    model = apply("AttnCtrlRegionMask", host.unet(), regions=region("red circle", **BOX)[0], words=words)
    x, sigma = noise(), torch.tensor([5.0, 5.0])

    def predictions(patcher: Any) -> list[torch.Tensor]:
        options = {"transformer_options": {"wrappers": patcher.wrappers}}
        return host.calc_cond_batch(patcher.model, [positive, negative], x, sigma, options)

    with torch.inference_mode():
        (cond, uncond), (stock_cond, stock_uncond) = predictions(model), predictions(host.unet())
    assert torch.equal(uncond, stock_uncond)
    assert not torch.equal(cond, stock_cond)


def test_a_longer_negative_prompt_repeats_the_positive_one(clip: Any, words: Any, positive: Any, negative: Any) -> None:
    model = apply("AttnCtrlRegionMask", host.unet(), regions=region("red circle", **BOX)[0], words=words)
    twice = [[torch.cat([negative[0][0]] * 2, dim=1), {}]]
    found, wanted = (host.sample(model, noise(), positive, n) for n in (twice, negative))
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert not torch.equal(found, host.sample(host.unet(), noise(), positive, twice))


def test_conditionings_in_calls_of_their_own(words: Any, positive: Any, negative: Any) -> None:
    """The negative prompt is shorter than the place of the words, and no length fits both."""
    short = [[negative[0][0][:, :3], {}]]
    model = apply("AttnCtrlRegionMask", host.unet(), regions=region("red circle", **BOX)[0], words=words)
    model, recorded = native.record(apply("AttnCtrlSoftPAG", model), words, "red circle")
    found = host.sample(model, noise(), positive, short)
    assert recorded.maps is not None
    assert len(recorded.maps) == 4
    stock = host.sample(host.unet(), noise(), positive, short)
    assert not torch.equal(found, stock)
    assert torch.equal(host.sample(model, noise(), positive, short), found)
    with torch.inference_mode():
        options = {"transformer_options": {"wrappers": model.wrappers}}
        (_, uncond), (_, stock_uncond) = (
            host.calc_cond_batch(model.model, [positive, short], noise(), torch.tensor([5.0, 5.0]), one)
            for one in (options, {"transformer_options": {}})
        )
    assert torch.equal(uncond, stock_uncond)


def test_nodes_compose_in_any_order_and_with_foreign_hooks(words: Any, positive: Any, negative: Any) -> None:
    regions = region("red circle", **BOX)[0]
    calls: list[int] = []

    def foreign(func: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(args[0].shape[0])
        return func(*args, **kwargs)

    def with_foreign(model: Any) -> Any:
        clone = model.clone()
        clone.model_options["transformer_options"]["optimized_attention_override"] = foreign
        return clone

    def mask(model: Any) -> Any:
        return apply("AttnCtrlRegionMask", model, regions=regions, words=words)

    def pag(model: Any) -> Any:
        return apply("AttnCtrlSoftPAG", model)

    orders = [(mask, pag), (pag, mask), (with_foreign, mask, pag), (mask, with_foreign, pag), (mask, pag, with_foreign)]
    results = []
    for order in orders:
        model = host.unet()
        for one in order:
            model = one(model)
        results.append(host.sample(model, noise(), positive, negative))
    alone = host.sample(mask(host.unet()), noise(), positive, negative)
    assert not torch.allclose(results[0], alone, atol=1e-4)
    assert all(torch.allclose(results[0], one, atol=1e-5) for one in results[1:])
    # A foreign hook sees every call, with all rows.
    assert set(calls) == {2, 4}


def test_a_core_node_that_took_a_layer_keeps_it(words: Any, positive: Any, negative: Any, caplog: Any) -> None:
    """As PerturbedAttentionGuidance does in its second pass: the layer is not asked for then."""
    base = host.unet()
    base.set_model_patch_replace(lambda q, k, v, extra: v, "attn1", "middle", 0)
    model = apply("AttnCtrlSoftPAG", base)
    with caplog.at_level(logging.WARNING):
        found = host.sample(model, noise(), positive, negative)
    assert torch.equal(found, host.sample(base, noise(), positive, negative))
    assert "guides nothing" in caplog.text


# declining --------------------------------------------------------------------------------------------------------
def test_other_conditionings_are_left_alone(clip: Any, words: Any, negative: Any, caplog: Any) -> None:
    other = clip.encode_from_tokens_scheduled(clip.tokenize("something else"))
    model = apply("AttnCtrlRegionMask", host.unet(), regions=region("red circle", **BOX)[0], words=words)
    with caplog.at_level(logging.WARNING):
        found = host.sample(model, noise(), other, negative)
    assert torch.equal(found, host.sample(host.unet(), noise(), other, negative))
    assert "is not the prompt whose words are connected" in caplog.text


def test_models_that_are_not_covered_are_left_alone(words: Any, caplog: Any) -> None:
    base = host.Patcher(host.BaseModel(torch.nn.Linear(1, 1)))
    with caplog.at_level(logging.WARNING):
        assert apply("AttnCtrlSoftPAG", base) is base
        assert (
            apply("AttnCtrlRegionPrompts", host.wan(), regions=region("circle", **BOX)[0], words=words).wrappers == {}
        )
    assert "SoftPAG is left out: Linear is not covered" in caplog.text
    assert "it makes keys of text" in caplog.text


def test_a_changed_batch_is_left_alone(words: Any, positive: Any, negative: Any, caplog: Any) -> None:
    model = apply("AttnCtrlRegionMask", host.unet(), regions=region("red circle", **BOX)[0], words=words)

    def doubled(n: torch.Tensor, context: Any, value: Any, extra: Any) -> tuple:
        return n.repeat(2, 1, 1), context.repeat(2, 1, 1), value.repeat(2, 1, 1)

    def halved(n: torch.Tensor, extra: Any) -> torch.Tensor:
        return n[: len(n) // 2]

    for patcher in (model, stock := host.unet()):
        patcher.set_model_patch(doubled, "attn2_patch")
        patcher.set_model_patch(halved, "attn2_output_patch")
    with caplog.at_level(logging.WARNING):
        found = host.sample(model, noise(), positive, negative)
    assert torch.equal(found, host.sample(stock, noise(), positive, negative))
    assert "another node changed the batch" in caplog.text


def test_bad_input_has_a_sentence(clip: Any, words: Any) -> None:
    regions = region("red circle", **BOX)[0]
    other = native.prompt_with_words(clip, "a red circle")[1]
    with pytest.raises(ControlError, match=r'"green" is not in the prompt.*2:red'):
        apply("AttnCtrlRegionMask", host.unet(), regions=region("green", **BOX)[0], words=words)
    with pytest.raises(ControlError, match=r"weight is 2: it must be in \[0, 1\]"):
        apply("AttnCtrlRegionMask", host.unet(), regions=regions, words=words, weight=2)
    model = apply("AttnCtrlRegionMask", host.unet(), regions=regions, words=words)
    with pytest.raises(ControlError, match="connect the words of the one"):
        apply("AttnCtrlDenseDiffusion", model, regions=regions, words=other)
    with pytest.raises(ControlError, match="both replace the attention"):
        apply("AttnCtrlDraft", apply("AttnCtrlRadial", host.wan()))
    with pytest.raises(ControlError, match="region 1 has no text"):
        apply("AttnCtrlRegionPrompts", host.unet(), regions=regions)


# maps ---------------------------------------------------------------------------------------------------------------
def test_recorded_maps_leave_the_picture_and_are_what_the_words_get(words: Any, positive: Any, negative: Any) -> None:
    base = host.unet()
    model, recorded = native.record(base, words, "red circle\nsquare")
    found = host.sample(model, noise(), positive, negative, steps=1)
    assert torch.equal(found, host.sample(base, noise(), positive, negative, steps=1))
    assert recorded.maps is not None
    shares: list[torch.Tensor] = []

    def watching(scores: torch.Tensor, value: torch.Tensor, extra: Any) -> torch.Tensor:
        probs = scores.softmax(-1)
        shares.append(probs.mean(1)[..., 2:4].mean(-1))
        return probs @ value

    # The grid nearest to a sixteenth of the latents is that of the layers within.
    watched = replacing("attn2", watching, [("input", 2), ("middle", 0), ("output", 0)])
    host.sample(watched, noise(), positive, negative, steps=1)
    wanted = torch.stack(shares).mean(0)
    assert torch.allclose(recorded.maps["red circle"][0].flatten(), wanted[0], atol=1e-5)
    image, mask = heat_maps(recorded, torch.rand(2, 32, 32, 3), 0.5)
    assert image.shape == (4, 32, 32, 3)
    assert mask.shape == (4, 32, 32)
    assert float(mask.amin()) == 0
    assert torch.allclose(mask.flatten(1).amax(1), torch.ones(4))
    with pytest.raises(ControlError, match="2 pictures were recorded, and 1"):
        heat_maps(recorded, torch.rand(1, 32, 32, 3), 0.5)


def test_every_native_node_is_of_a_registered_method() -> None:
    assert set(native.NATIVE) <= set(REGISTRY)
