"""The native nodes in ComfyUI's own models and sampler: ATTNCTRL_COMFYUI names its source tree.

Run it with the Python of ComfyUI's environment, in which attnctrl is installed or on PYTHONPATH.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

TREE = os.environ.get("ATTNCTRL_COMFYUI")
pytestmark = pytest.mark.skipif(not TREE, reason="ATTNCTRL_COMFYUI does not name a ComfyUI tree")
PROMPT = "a red circle and a blue square"


@pytest.fixture(scope="module", autouse=True)
def comfy() -> Iterator[None]:
    """ComfyUI reads the command line when it is first imported."""
    before, sys.argv = sys.argv, ["tests", "--cpu"]
    sys.path.insert(0, str(Path(TREE or "")))
    import comfy.options

    comfy.options.enable_args_parsing()
    yield
    sys.argv = before
    sys.path.remove(str(Path(TREE or "")))


def initialised(model: Any) -> Any:
    """With weights: ComfyUI's layers make none, for they are loaded."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5)
            else:
                parameter.fill_(float(name.endswith(("weight", "scale"))))
    return model


def patcher(config: str, base: str, network: dict[str, Any]) -> Any:
    """A tiny random model of a supported kind, as core loaders make them."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    described = getattr(comfy.supported_models, config)({**network, "dtype": torch.float32})
    described.unet_config = {**network, "dtype": torch.float32}
    model = initialised(getattr(comfy.model_base, base)(described, device="cpu"))
    return comfy.model_patcher.ModelPatcher(model.eval(), torch.device("cpu"), torch.device("cpu"))


@pytest.fixture(scope="module")
def unet(comfy: None) -> Any:
    network = {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
        "channel_mult": (1, 2), "num_heads": 2, "use_spatial_transformer": True, "transformer_depth": [1, 1],
        "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1, "context_dim": 16,
        "use_linear_in_transformer": False,
    }  # fmt: skip
    return patcher("SD15", "BaseModel", network)


@pytest.fixture(scope="module")
def flux(comfy: None) -> Any:
    network = {
        "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 8, "context_in_dim": 16,
        "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 2,
        "axes_dim": [4, 6, 6], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": False,
    }  # fmt: skip
    return patcher("Flux", "Flux", network)


@pytest.fixture(scope="module")
def wan(comfy: None) -> Any:
    network = {
        "image_model": "wan2.1", "model_type": "t2v", "dim": 64, "ffn_dim": 64, "freq_dim": 32, "text_dim": 16,
        "num_heads": 2, "num_layers": 2, "in_dim": 16, "out_dim": 16,
    }  # fmt: skip
    return patcher("WAN21_T2V", "WAN21", network)


class Clip:
    """ComfyUI's tokenizer of Stable Diffusion 1, and random embeddings."""

    def __init__(self, channels: int = 16) -> None:
        from comfy.sd1_clip import SD1Tokenizer

        self.tokenizer = SD1Tokenizer()
        self.table = torch.randn(49408, channels, generator=torch.Generator().manual_seed(1))

    def tokenize(self, text: str) -> Any:
        return self.tokenizer.tokenize_with_weights(text)

    def encode_from_tokens_scheduled(self, pairs: Any) -> Any:
        tokens = self.table[[i for chunk in pairs["l"] for i, _ in chunk]]
        return [[(tokens + 0.2 * tokens.mean(0))[None], {"pooled_output": torch.zeros(1, 8)}]]


@pytest.fixture(scope="module")
def clip(comfy: None) -> Clip:
    return Clip()


def sample(model: Any, clip: Clip, shape: tuple[int, ...], positive: Any, steps: int = 3, cfg: float = 3.0) -> Any:
    import comfy.sample

    negative = clip.encode_from_tokens_scheduled(clip.tokenize("blurry"))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        return comfy.sample.sample(
            model,
            noise,
            steps,
            cfg,
            "euler",
            "simple",
            positive,
            negative,
            torch.zeros(shape),
            disable_pbar=True,
            seed=0,
        )


def apply(name: str, model: Any, **given: Any) -> Any:
    import comfy.samplers

    from attnctrl.nodes.catalog import NODES

    node = next(n for n in NODES if n.id == name)
    defaults = {p.name: p.default for p in node.inputs if p.widget} | {"window_start": 0.0, "window_end": 1.0}
    needs = {"calc_cond_batch": comfy.samplers.calc_cond_batch}
    return node.run(model=model, **{**defaults, **given}, **{n: needs[n] for n in node.needs})[0]


@pytest.fixture(scope="module")
def words(clip: Clip) -> Any:
    from attnctrl.nodes.native import prompt_with_words

    return prompt_with_words(clip, PROMPT)[1]


@pytest.fixture(scope="module")
def regions() -> Any:
    from attnctrl.nodes.places import region

    first = region("a red circle", x1=0.5)[0]
    return region("a blue square", x0=0.5, regions=first)[0]


SHAPES = {"unet": (1, 4, 16, 16), "flux": (1, 16, 16, 16), "wan": (1, 16, 3, 16, 16)}
NODES = {
    "AttnCtrlRegionMask": ("unet", "flux", "wan"),
    "AttnCtrlRegionPrompts": ("unet",),
    "AttnCtrlDenseDiffusion": ("unet", "flux", "wan"),
    "AttnCtrlSoftPAG": ("unet", "flux", "wan"),
    "AttnCtrlRadial": ("wan",),
    "AttnCtrlDraft": ("unet", "flux", "wan"),
    "AttnCtrlNeighborhoodTiles": ("unet", "flux", "wan"),
}
SPARSE: dict[str, Any] = {"block": "16", "fall_back": False}
MORE: dict[str, dict[str, Any]] = {
    "AttnCtrlRadial": SPARSE | {"whole": 0, "floor": 0.0, "sink": 0},
    "AttnCtrlDraft": SPARSE,
    "AttnCtrlNeighborhoodTiles": SPARSE,
}


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kinds in NODES.items() for kind in kinds])
def test_each_node_acts_through_the_sampler_and_leaves_the_model(
    name: str, kind: str, request: Any, clip: Clip, words: Any, regions: Any
) -> None:
    base = request.getfixturevalue(kind)
    about = {"regions": regions, "words": words} if "regions" in str(_ports(name)) else {}
    stock = sample(base, clip, SHAPES[kind], words.conditioning)
    model = apply(name, base, **about, **MORE.get(name, {}))
    found = sample(model, clip, SHAPES[kind], words.conditioning)
    assert torch.isfinite(found).all()
    assert (found - stock).abs().max() > 1e-5 * stock.abs().max()
    assert torch.equal(sample(model, clip, SHAPES[kind], words.conditioning), found)
    assert torch.equal(sample(base, clip, SHAPES[kind], words.conditioning), stock)
    late = {"window_start": 0.99} | ({"swap_phrases": False} if name == "AttnCtrlDenseDiffusion" else {})
    idle = apply(name, base, **about, **MORE.get(name, {}), **late)
    assert torch.equal(sample(idle, clip, SHAPES[kind], words.conditioning), stock)


def _ports(name: str) -> list[str]:
    from attnctrl.nodes.catalog import NODES as every

    return [p.name for n in every if n.id == name for p in n.inputs]


def test_a_region_mask_is_its_bias_in_the_real_unet(unet: Any, clip: Clip, words: Any, regions: Any) -> None:
    """Against ComfyUI's own replacement of cross-attention, with the bias written out."""
    import torch.nn.functional as F

    model = apply("AttnCtrlRegionMask", unet, regions=regions, words=words, weight=0.8, boost=3.0)

    def biased(q: Any, k: Any, v: Any, extra: dict) -> torch.Tensor:
        heads, count = extra["n_heads"], len(extra["cond_or_uncond"])
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        side = int(q.shape[2] ** 0.5)
        left = (torch.arange(q.shape[2]) % side < side // 2).float()[:, None]
        bias = torch.zeros(q.shape[2], k.shape[2])
        away = torch.tensor(0.2).log()
        # "a red circle" is tokens 1 to 3 of the prompt, "a blue square" 5 to 7.
        bias[:, 1:4] = left * 3.0 + (1 - left) * away
        bias[:, 5:8] = (1 - left) * 3.0 + left * away
        masks = torch.stack([bias if n == 0 else torch.zeros_like(bias) for n in extra["cond_or_uncond"]])
        masks = masks.repeat_interleave(q.shape[0] // count, 0)[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=masks).transpose(1, 2).flatten(2)

    plain = unet.clone()
    for place in [("input", 1), ("input", 3), ("middle", 0), *(("output", i) for i in range(4))]:
        plain.set_model_attn2_replace(biased, *place)
    found, wanted, stock = (sample(m, clip, SHAPES["unet"], words.conditioning) for m in (model, plain, unet))
    apart = (wanted - stock).abs().max()
    assert apart > 1e-3
    assert (found - wanted).abs().max() < 1e-2 * apart


def test_soft_pag_of_strength_one_is_the_core_node(unet: Any, clip: Clip, words: Any) -> None:
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    model = apply("AttnCtrlSoftPAG", unet, scale=2.0)
    core = PerturbedAttentionGuidance.execute(unet, 2.0).args[0]
    found, wanted, stock = (sample(m, clip, SHAPES["unet"], words.conditioning) for m in (model, core, unet))
    apart = (wanted - stock).abs().max()
    assert apart > 1e-3
    assert (found - wanted).abs().max() < 1e-2 * apart


def test_nodes_compose_with_core_nodes_in_any_order(unet: Any, clip: Clip, words: Any, regions: Any) -> None:
    from comfy_extras.nodes_freelunch import FreeU_V2
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    def mask(model: Any) -> Any:
        return apply("AttnCtrlRegionMask", model, regions=regions, words=words)

    def pag(model: Any) -> Any:
        return PerturbedAttentionGuidance.execute(model, 2.0).args[0]

    def freeu(model: Any) -> Any:
        result = FreeU_V2.execute if hasattr(FreeU_V2, "define_schema") else FreeU_V2().patch
        return result(model, 1.3, 1.4, 0.9, 0.2)[0]

    results = []
    orders: list[tuple[Callable, ...]] = [(mask, pag, freeu), (freeu, pag, mask)]
    for order in orders:
        model = unet
        for one in order:
            model = one(model)
        results.append(sample(model, clip, SHAPES["unet"], words.conditioning))
    assert torch.allclose(*results, atol=1e-4)
    for alone in (mask(unet), pag(unet), freeu(unet)):
        assert not torch.allclose(results[0], sample(alone, clip, SHAPES["unet"], words.conditioning), atol=1e-3)


def test_a_conditioning_for_a_part_of_the_picture_is_left_alone(
    unet: Any, clip: Clip, words: Any, regions: Any, caplog: Any
) -> None:
    other = clip.encode_from_tokens_scheduled(clip.tokenize("a green field"))
    cut = [*other, [words.conditioning[0][0], {**words.conditioning[0][1], "area": (8, 8, 0, 0), "strength": 1.0}]]
    model = apply("AttnCtrlRegionMask", unet, regions=regions, words=words)
    assert torch.equal(sample(model, clip, SHAPES["unet"], cut), sample(unet, clip, SHAPES["unet"], cut))
    assert "is for a part of the picture" in caplog.text


def test_recorded_maps(unet: Any, flux: Any, clip: Clip, words: Any) -> None:
    from attnctrl.nodes.native import record

    for kind, base in (("unet", unet), ("flux", flux)):
        model, recorded = record(base, words, "red circle\nblue square")
        found = sample(model, clip, SHAPES[kind], words.conditioning)
        assert torch.equal(found, sample(base, clip, SHAPES[kind], words.conditioning))
        assert recorded.maps is not None
        assert len(recorded.maps) == 3
        assert float(recorded.maps["red circle"].min()) >= 0
