"""Each native node against a plain reference, in a stand-in for ComfyUI."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from attnctrl.controls.sparse.neighborhood_tiles import neighborhood
from attnctrl.controls.sparse.radial import radial_blocks
from attnctrl.nodes.places import region
from tests.nodes import host
from tests.nodes.helpers import BOX, SITES, Scores, apply, close, left_half, masked_wan, noise, replacing


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
