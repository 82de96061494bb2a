"""The registry as tests use it, every method at work or idle; and the material of formulas without a model."""

from __future__ import annotations

from typing import Any

import torch

import attnctrl as ac
from attnctrl.controls import REGISTRY, Method
from attnctrl.edits import Edit
from attnctrl.prompt import Reader
from attnctrl.sampling import Sampling
from attnctrl.sites import Site, Step
from attnctrl.stepmaps import SelfMap
from attnctrl.text import Text
from tests import tiny
from tests.probes import REGIONS

# Parameters under which a method asks for nothing: the picture must be the stock one, bit for bit.
WEIGHTLESS: dict[str, list[dict[str, Any]]] = {
    "region-mask": [{"weight": 0.0, "boost": 0.0}],
    "region-prompts": [{"base_ratio": 1.0}],
    "dense-diffusion": [{"cross_weight": 0.0, "self_weight": 0.0}],
    "layout-guidance": [{"scale": 0.0}, {"iterations": 0}],
    "refocus": [{"scale": 0.0}, {"cross_weight": 0.0, "self_weight": 0.0}],
    "loco": [{"scale": 0.0}, {"iterations": 0}],
    "eligen": [{"until": 0.0}],
    "regional-flux": [{"until": 0.0}, {"base_ratio": 1.0}],
    "rag": [{"hard_binding": 0.0, "soft_refinement": 0.0}, {"hard_binding": 0.0, "until": 0.0}],
    "attend-excite": [{"scale": 0.0}, {"iterations": 0, "refinements": 0}],
    "a-star": [{"scale": 0.0}, {"iterations": 0}, {"segregation_weight": 0.0, "retention_weight": 0.0}],
    "conform": [{"scale": 0.0}, {"iterations": 0, "refinements": 0}],
    "divide-bind": [{"scale": 0.0}, {"iterations": 0, "refinements": 0}],
    "bundled-attention": [{"scale": 0.0}, {"iterations": 0}],
    "init-no": [{"scale": 0.0, "rounds": 0}, {"scale": 0.0, "iterations": 0}, {"scale": 0.0, "rate": 0.0}],
    "dynamic-prompt": [
        {"scale": 0.0},
        {"iterations": 0},
        {"attention_weight": 0.0, "background_weight": 0.0, "disjoint_weight": 0.0},
    ],
    "opti-prune": [{"rounds": 0, "ratio": 0.0}, {"iterations": 0, "patch": 1}],
    "inpaint-fusion": [],
    "prompt-to-prompt": [{"cross_until": 0.0, "self_until": 0.0}],
    "mutual-self-attention": [{"from_layer": 1.0}],
    "ale-edit": [],
    "multi-mask-inpaint": [{"weight": 0.0}],
    "focus-on-instruction": [{"modulate": False, "disentangle": False}],
    "lime": [],
    "semantic-protection": [],
    "plug-and-play": [{"features_until": 0.0, "attention_until": 0.0}],
    "design-edit": [],
    "prime-composer": [],
    "soft-pag": [{"scale": 0.0}, {"strength": 0.0}, {"heads": ()}],
    "self-attention-guidance": [{"scale": 0.0}],
    "semantic-cfg": [{"weight": 0.0}],
    "segment": [],
    "segment-like-me": [{"rate": 0.0}, {"iterations": 0}],
    "correspond": [{"rate": 0.0}, {"iterations": 0}],
    "magic-face": [{"from_layer": 1.0}],
    "isolation-reposition": [{"keep": 0.0, "isolate_until": 0.0, "mutual": 0.0}],
    "appearance-matching": [{"threshold": 0.0}, {"from_layer": 1.0}],
    "consistent-self-attention": [{"keep": 0.0}, {"anchors": 0}, {"early": 0.0, "late": 0.0}],
    "shared-attention": [{"keep": 0.0}, {"anchors": 0}],
    "delayed-subject": [{"delay": 1.0}],
    "masked-adain": [{"share": 0.0}],
    "masked-reference": [{"from_layer": 1.0}],
    "time-aware-reference": [{"from_layer": 1.0}, {"lowest": 0.0, "highest": 0.0}],
    "object-masks": [{"cross_weight": 0.0, "self_weight": 0.0}, {"until_layer": 0.0}],
    "in-context-mask": [{"references": 0}],
    "localized-residual": [{"outside": 1.0}],
    "persona-hoi": [],
    "radial": [],
    "neighborhood-tiles": [],
    "sliding-tile": [],
    "draft": [],
    "paro": [],
    "rettention": [],
    "vmoba": [],
    "agent-attention": [{"ratio": 0.0, "agents_until": 0.0}, {"ratio": 0.0, "agent_ratio": 0.0}],
    "planned": [],
    "random-blocks": [],
    "oracle-blocks": [],
}

CLASSIC = [name for name, m in REGISTRY.items() if m.where.kinds != ("joint",) and m.task in ("layout", "fidelity")]
"""The methods that act on separate text keys, so on the UNets, and need no given picture; the others have tests of
their own."""

BINDING: dict[str, dict[str, Any]] = {
    "conform": {"pairs": (("a", "cat"), ("a", "dog")), "shares": True},
    "bundled-attention": {"pairs": (("a", "cat"), ("a", "dog"))},
}
"""Methods that do little where nouns have no attributes; of the tiny prompts the articles must serve."""


LIVELY: dict[str, dict[str, Any]] = {"dynamic-prompt": {"scale": 1000.0}}
"""An untrained model hardly minds its text, so that its embeddings need large steps."""


def subject(method: Method) -> tuple[Any, ...]:
    """What the method is about, as arguments: the regions, or the phrases of the regions, or nothing."""
    about = {"regions": REGIONS, "phrases": tuple(region.phrase for region in REGIONS)}
    about["edits"] = tuple(Edit(phrase, "red") for phrase in about["phrases"])
    fields = method.control.__dataclass_fields__
    return tuple(about[name] for name in about if name in fields and not fields[name].kw_only)[:1]


def busy(name: str, about: Any = None, **params: Any) -> ac.Control:
    """The method at work in every step of the run, with few descents because they cost time."""
    entry = REGISTRY[name]
    usual: dict[str, Any] = {"window": ac.Window(0.0, 1.0)}
    usual |= {name: 2 for name in ("iterations", "refinements", "rounds") if name in entry.params}
    usual |= BINDING.get(name, {}) | LIVELY.get(name, {})
    return entry.make(*(subject(entry) if about is None else (about,)), **usual | params)


def idle_forms() -> dict[str, ac.Control]:
    """Every way of asking a registered method for nothing, by a readable name."""
    forms = {}
    for name, method in REGISTRY.items():
        for params in WEIGHTLESS[name]:
            forms[f"{name}-{'-'.join(params)}"] = busy(name, **params)
        if subject(method):
            forms[f"{name}-no-subject"] = method.make(())
        if subject(method) and "edits" not in method.settings:
            forms[f"{name}-no-subject-per-prompt"] = method.make(((),))
        if "pairs" in method.control.__dataclass_fields__:
            forms[f"{name}-no-pairs"] = busy(name, pairs=())
        forms[f"{name}-empty-window"] = busy(name, window=ac.Window(0.5, 0.5))
    return forms


SITES = (Site("down.attn1", "self", "down", 0, 0), Site("down.attn2", "cross", "down", 1, 0))


def sampling(prompt: str | list[str] = tiny.PROMPT, grid: tuple[int, int] = (2, 2), images: int = 1) -> Sampling:
    """A sampling without a pipeline: one self- and one cross-attention site at the latents' own grid."""
    prompts = [prompt] if isinstance(prompt, str) else prompt

    def encode(texts: list[str]) -> Text:
        # Row n of a text's embedding is its length plus n: easy to recognise.
        rows = [torch.arange(24.0)[:, None].expand(24, 16) + 100 * len(text) for text in texts]
        return Text(torch.stack(rows))

    return Sampling(
        prompts=prompts,
        tokenize=lambda texts=prompts: [[Reader(tiny.tokenizer()).read(t)] for t in texts],
        images_per_prompt=images,
        prompt_count=len(prompts),
        guided=True,
        text_tokens=24,
        encode=encode,
        sites=list(SITES),
        latent_grid=(1, *grid),
    )


def self_map(attention: torch.Tensor, grid: tuple[int, int]) -> SelfMap:
    """A self-attention site whose one head has this matrix of probabilities (tokens, tokens), all above 0."""
    count = len(attention)
    query = torch.eye(count, dtype=attention.dtype)[None, None]
    return SelfMap(SITES[0], (1, *grid), query, attention.log().T[None, None], None, 1.0)


def step(index: int, total: int = 50) -> Step:
    return Step(index, total, 1000.0 * (1 - index / total), 1 - index / total)
