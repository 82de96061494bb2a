"""Native nodes against plain references, in a stand-in for ComfyUI."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from attnctrl.controls import REGISTRY
from attnctrl.controls.sparse.neighborhood_tiles import neighborhood
from attnctrl.controls.sparse.radial import radial_blocks
from attnctrl.errors import ControlError
from attnctrl.nodes import native
from attnctrl.nodes.catalog import NODES
from attnctrl.nodes.pictures import heat_maps
from attnctrl.nodes.places import region
from tests.nodes import host

NODE = {node.id: node for node in NODES}
SITES = [("input", 0), ("input", 2), ("middle", 0), ("output", 0), ("output", 1)]
PROMPT = "a red circle and a square"
BOX = {"x0": 0.0, "y0": 0.0, "x1": 0.5, "y1": 1.0}


def apply(name: str, model: Any, **given: Any) -> Any:
    """A native node with the defaults of its ports, acting from the first step to the last."""
    node = NODE[name]
    defaults = {p.name: p.default for p in node.inputs if p.widget} | {"window_start": 0.0, "window_end": 1.0}
    needs = {"calc_cond_batch": host.calc_cond_batch}
    return node.run(model=model, **{**defaults, **given}, **{n: needs[n] for n in node.needs})[0]


@pytest.fixture
def clip() -> host.Clip:
    return host.Clip()


@pytest.fixture
def words(clip: host.Clip) -> Any:
    return native.prompt_with_words(clip, PROMPT)[1]


@pytest.fixture
def positive(words: Any) -> Any:
    return words.conditioning


@pytest.fixture
def negative(clip: host.Clip) -> Any:
    return clip.encode_from_tokens_scheduled(clip.tokenize("nothing at all"))


def noise(*sizes: int) -> torch.Tensor:
    return torch.randn(2, host.CHANNELS, *(sizes or (8, 8)), generator=torch.Generator().manual_seed(1))


def left_half(tokens: int) -> torch.Tensor:
    """Which latents of a square grid lie in BOX."""
    side = int(tokens**0.5)
    return (torch.arange(tokens) % side < side // 2).float()


Scores = Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor]


def replacing(kind: str, change: Scores, places: list = SITES) -> Any:
    """The host's model with materialised attention in `kind`, whose scores are changed in the conditional rows."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (host.HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        rows = []
        for one, values, branch in zip(scores.chunk(len(extra["cond_or_uncond"])),
                                       v.chunk(len(extra["cond_or_uncond"])), extra["cond_or_uncond"],
                                       strict=True):  # fmt: skip
            rows.append(change(one, values, extra) if branch == 0 else one.softmax(-1) @ values)
        return torch.cat(rows).transpose(1, 2).flatten(2)

    patcher = host.unet()
    for place in places:
        patcher.set_model_patch_replace(attention, kind, *place)
    return patcher


def close(found: torch.Tensor, wanted: torch.Tensor, stock: torch.Tensor) -> None:
    """Found is as wanted, and both differ from the stock result by far more than rounding."""
    apart = (wanted - stock).abs().max()
    assert apart > 1e-3
    assert (found - wanted).abs().max() < 1e-3 * apart


# each node against its formula ------------------------------------------------------------------------------------
def test_region_mask_adds_its_bias(words: Any, positive: Any, negative: Any) -> None:
    regions = region("red circle", **BOX)[0]
    model = apply("AttnCtrlRegionMask", host.unet(), regions=regions, words=words, weight=0.9, boost=2.0)

    def biased(scores: torch.Tensor, value: torch.Tensor, extra: Any) -> torch.Tensor:
        bias = torch.zeros(scores.shape[-2:])
        # "red" and "circle" are tokens 2 and 3.
        inside = left_half(len(bias))[:, None]
        bias[:, 2:4] = inside * 2.0 + (1 - inside) * torch.tensor(0.1).log()
        return (scores + bias).softmax(-1) @ value

    wanted, stock = (host.sample(m, noise(), positive, negative) for m in (replacing("attn2", biased), host.unet()))
    close(host.sample(model, noise(), positive, negative), wanted, stock)


@pytest.mark.parametrize("encoded", [False, True])
def test_region_prompts_merges_attentions_by_area(clip: Any, words: Any, positive: Any, encoded: bool) -> None:
    own = clip.encode_from_tokens_scheduled(clip.tokenize("one green star"))
    given = {"conditioning": own} if encoded else {"prompt": "one green star"}
    regions = region("a thing" if encoded else "green", **BOX, **given)[0]
    extra_words = {} if encoded else {"words": words}
    base = host.unet()
    model = apply("AttnCtrlRegionPrompts", base, regions=regions, base_ratio=0.25, confine=False, **extra_words)
    layers = {"input": [b[0] for b in base.model.diffusion_model.input_blocks],
              "middle": [base.model.diffusion_model.middle_block[0]],
              "output": [b[0] for b in base.model.diffusion_model.output_blocks]}  # fmt: skip

    def replaced(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict) -> torch.Tensor:
        part, number = extra["block"]
        layer = layers[part][number].transformer_blocks[0].attn2
        main = host.backend(q, k, v, host.HEADS)
        text = own[0][0].expand(2, -1, -1)
        rows = slice(2, 4) if extra["cond_or_uncond"] == [1, 0] else slice(0, 2)
        of_region = host.backend(q[rows], layer.to_k(text), layer.to_v(text), host.HEADS)
        share = 0.75 * left_half(q.shape[1])[:, None]
        main[rows] = (1 - share) * main[rows] + share * of_region
        return main

    plain = host.unet()
    for place in SITES:
        plain.set_model_patch_replace(replaced, "attn2", *place)
    wanted, stock = (host.sample(m, noise(), positive, positive) for m in (plain, host.unet()))
    close(host.sample(model, noise(), positive, positive), wanted, stock)


def test_dense_diffusion_moves_scores_and_replaces_words(clip: Any, words: Any, positive: Any, negative: Any) -> None:
    regions = region("red circle", **BOX)[0]
    model = apply(
        "AttnCtrlDenseDiffusion", host.unet(), regions=regions, words=words, cross_weight=0.8, self_weight=0.4
    )

    def moved(weight: float, text: bool) -> Scores:
        def change(scores: torch.Tensor, value: torch.Tensor, extra: Any) -> torch.Tensor:
            inside = left_half(scores.shape[-2])
            # Half of the picture is inside, so that the push of the region's own pixels is halved.
            noise_left = float(extra["sigmas"][0]) / 10
            strength = weight * noise_left * (1 - 0.5 * inside)[:, None]
            same = inside[:, None].expand(-1, scores.shape[-1]) if text else inside[:, None] * inside[None]
            high, low = scores.amax(-1, keepdim=True), scores.amin(-1, keepdim=True)
            pushed = scores + strength * (torch.where(same > 0, high, low) - scores)
            touched = torch.zeros_like(scores, dtype=torch.bool)
            if text:
                touched[..., 2:4] = True
            else:
                touched[..., inside > 0, :] = True
            return torch.where(touched, pushed, scores).softmax(-1) @ value

        return change

    plain = replacing("attn2", moved(0.8, True))
    for place, table in (
        replacing("attn1", moved(0.4, False)).model_options["transformer_options"]["patches_replace"]["attn1"].items()
    ):
        plain.set_model_patch_replace(table, "attn1", *place)
    swapped = positive[0][0].clone()
    swapped[:, 2:4] = clip.encode_from_tokens_scheduled(clip.tokenize("red circle"))[0][0][:, 1:3]
    wanted = host.sample(plain, noise(), [[swapped, {}]], negative)
    close(
        host.sample(model, noise(), positive, negative), wanted, host.sample(host.unet(), noise(), positive, negative)
    )


def test_soft_pag_guides_away_from_softened_attention(positive: Any, negative: Any) -> None:
    model = apply("AttnCtrlSoftPAG", host.unet(), scale=3.0, strength=0.7)
    plain = host.unet()

    def softened(scores: torch.Tensor, value: torch.Tensor, extra: Any) -> torch.Tensor:
        return 0.3 * (scores.softmax(-1) @ value) + 0.7 * value

    perturbed = replacing("attn1", softened, [("middle", 0)]).model_options["transformer_options"]["patches_replace"]

    def guide(args: dict) -> torch.Tensor:
        options = {
            "transformer_options": {**args["model_options"]["transformer_options"], "patches_replace": perturbed}
        }
        (found,) = host.calc_cond_batch(args["model"], [args["cond"]], args["input"], args["sigma"], options)
        return args["denoised"] + 3.0 * (args["cond_denoised"] - found)

    plain.set_model_sampler_post_cfg_function(guide)
    wanted, stock = (host.sample(m, noise(), positive, negative) for m in (plain, host.unet()))
    close(host.sample(model, noise(), positive, negative), wanted, stock)
    # Without guidance by the text too.
    wanted, stock = (host.sample(m, noise(), positive, cfg=1) for m in (plain, host.unet()))
    close(host.sample(model, noise(), positive, cfg=1), wanted, stock)


def masked_wan(visible: torch.Tensor) -> Any:
    """The host's video model whose latents see each other as a mask says, by a plain override."""
    patcher = host.wan()

    def override(func: Callable, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        more = {"mask": visible} if k.shape[1] == q.shape[1] else {}
        return func(q, k, v, *args, **kwargs, **more)

    patcher.model_options["transformer_options"]["optimized_attention_override"] = override
    return patcher


def test_radial_in_a_video_model(positive: Any, negative: Any) -> None:
    latents = noise(3, 8, 8)
    given = {"block": "16", "decay": 0.2, "sink": 1, "whole": 0, "floor": 0.0, "fall_back": False}
    model = apply("AttnCtrlRadial", host.wan(), **given)
    blocks = radial_blocks(3, 64, 0.2, 16, sink=1, whole=0, floor=0.0)
    visible = blocks.repeat_interleave(16, 0).repeat_interleave(16, 1)
    assert 0 < visible.float().mean() < 1
    plain = host.wan()
    # The default leaves the first layer of a model dense.
    sparse = masked_wan(visible)
    override = sparse.model_options["transformer_options"]["optimized_attention_override"]
    calls: list[int] = []

    def but_the_first(func: Callable, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return func(*args, **kwargs) if len(calls) % 4 == 1 else override(func, *args, **kwargs)

    sparse.model_options["transformer_options"]["optimized_attention_override"] = but_the_first
    wanted, stock = (host.sample(m, latents, positive, negative) for m in (sparse, plain))
    close(host.sample(model, latents, positive, negative), wanted, stock)


def test_neighborhood_tiles_in_a_video_model(positive: Any, negative: Any) -> None:
    latents = noise(2, 8, 8)
    model = apply("AttnCtrlNeighborhoodTiles", host.wan(), block="16", density=0.3, extent="1, 4, 4", fall_back=False)
    order, mask = neighborhood((2, 8, 8), (1, 4, 4), (1, 4, 4), (1, 4, 4))
    back = order.argsort()
    visible = mask.dense()[0, 0][back][:, back]
    wanted, stock = (host.sample(m, latents, positive, negative) for m in (masked_wan(visible), host.wan()))
    close(host.sample(model, latents, positive, negative), wanted, stock)


def test_draft_visits_the_blocks_with_the_highest_means(positive: Any, negative: Any) -> None:
    latents = noise(1, 8, 16)
    model = apply("AttnCtrlDraft", host.wan(), block="16", density=0.4, fall_back=False)
    seen: list[int] = []

    def override(func: Callable, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        if k.shape[1] != q.shape[1] or len(seen) % 4 == 1:  # text, and the first layer
            return func(q, k, v, *args, **kwargs)
        # A block is 4x4 latents.
        tile = torch.arange(8)[:, None] // 4 * 4 + torch.arange(16)[None] // 4
        tile = tile.flatten()
        heads = [t.unflatten(-1, (host.HEADS, -1)).transpose(1, 2) for t in (q, k)]
        mean = [torch.stack([h[:, :, tile == i].mean(2) for i in range(8)], dim=2) for h in heads]
        draft = (mean[0] @ mean[1].transpose(-1, -2) * mean[0].shape[-1] ** -0.5).softmax(-1)
        draft = draft.masked_fill(torch.eye(8, dtype=torch.bool), 2.0)
        kept = draft.flatten(2).topk(round(0.4 * 64), dim=-1).indices
        blocks = torch.zeros_like(draft.flatten(2)).scatter(-1, kept, 1.0).view_as(draft) > 0
        return func(q, k, v, *args, **kwargs, mask=blocks[:, :, tile][:, :, :, tile])

    plain = host.wan()
    plain.model_options["transformer_options"]["optimized_attention_override"] = override
    wanted, stock = (host.sample(m, latents, positive, negative) for m in (plain, host.wan()))
    close(host.sample(model, latents, positive, negative), wanted, stock)


def test_in_one_sequence_the_latents_follow_the_text(words: Any, positive: Any, negative: Any) -> None:
    """SoftPAG in the middle of a model with joint attention: the rows of latents are their own values, text stays."""
    calls: list[int] = []

    def override(func: Callable, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        out = func(q, k, v, *args, **kwargs)
        if len(calls) % 3 == 2:
            out[:, host.TOKENS :] = v.transpose(1, 2).flatten(2)[:, host.TOKENS :]
        return out

    def guide(args: dict) -> torch.Tensor:
        given = args["model_options"]["transformer_options"]
        options = {"transformer_options": {**given, "optimized_attention_override": override}}
        (found,) = host.calc_cond_batch(args["model"], [args["cond"]], args["input"], args["sigma"], options)
        return args["denoised"] + 2.0 * (args["cond_denoised"] - found)

    plain = host.flux()
    plain.set_model_sampler_post_cfg_function(guide)
    model = apply("AttnCtrlSoftPAG", host.flux(), scale=2.0)
    wanted, stock = (host.sample(m, noise(), positive, negative) for m in (plain, host.flux()))
    close(host.sample(model, noise(), positive, negative), wanted, stock)
    masked = apply("AttnCtrlRegionMask", host.flux(), regions=region("red circle", **BOX)[0], words=words)
    assert not torch.equal(host.sample(masked, noise(), positive, negative), stock)


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
