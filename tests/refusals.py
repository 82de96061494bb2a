"""What each family refuses, by doing it: the sentences stand in docs/families.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import LTXImageToVideoPipeline

import attnctrl as ac
from attnctrl.errors import ControlError
from attnctrl.processors import family_of
from tests import tiny
from tests.families import PIPELINES
from tests.probes import REGIONS, Noise
from tests.transformers import draw


def _entities(name: str) -> Callable[[], Any]:
    """EliGen on a pipeline."""

    def tried() -> None:
        family = PIPELINES[name]
        pipe = family.make()
        with ac.control(pipe, ac.EliGen(REGIONS, entity_tokens=4)):
            draw(pipe, family, steps=2)

    return tried


def _compiled(name: str) -> Callable[[], Any]:
    """Any control on a compiled transformer."""

    def tried() -> None:
        family = PIPELINES[name]
        pipe = family.make()
        pipe.transformer.compile(backend="eager")
        with ac.control(pipe, Noise()):
            draw(pipe, family, steps=2)

    return tried


def _configured(name: str, **config: Any) -> Callable[[], Any]:
    """A pipeline whose model is of a form that the family does not read."""

    def tried() -> None:
        pipe = PIPELINES[name].make()
        pipe.transformer.register_to_config(**config)
        family_of(pipe)

    return tried


def _ip_adapter() -> None:
    from tests.hosts.test_pipelines import ip_adapter

    pipe = tiny.sd()
    ip_adapter(pipe)
    with ac.control(pipe, ac.RegionMask(REGIONS)):
        pass


def _cached_references() -> None:
    pipe = PIPELINES["flux2"].make()
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "kv_cache_mode": "extract"}), with_kwargs=True
    )
    with ac.control(pipe, Noise()):
        draw(pipe, PIPELINES["flux2"])


def _omni() -> None:
    pipe = PIPELINES["zimage"].make()
    family_of(pipe).sample((), {"x": [[torch.zeros(4, 1, 8, 8)]]})


def _longer_text() -> None:
    pipe = PIPELINES["wan-image"].make()
    text = torch.zeros(1, 512, 16)
    family = family_of(pipe)
    longer = family.text((torch.zeros(1, 516, 16), None))
    family.outputs(longer, (text, None))


def _ltx_image() -> None:
    family_of(LTXImageToVideoPipeline(**PIPELINES["ltx"].make().components))


REFUSED: tuple[tuple[str, str, Callable[[], Any]], ...] = (
    ("sd", "an IP-Adapter's layers", _ip_adapter),
    ("sd3", "a compiled model", _compiled("sd3")),
    ("qwen", "QwenImage-Layered", _configured("qwen", use_layer3d_rope=True)),
    ("sana", "SANA-Sprint", _configured("sana", guidance_embeds=True)),
    ("sana", "entity prompts", _entities("sana")),
    ("flux2", "cached reference tokens", _cached_references),
    ("zimage", "the omni form", _omni),
    ("zimage", "entity prompts", _entities("zimage")),
    ("wan", "a compiled model", _compiled("wan")),
    ("wan-image", "longer text beside an image branch", _longer_text),
    ("cogvideox", "entity prompts", _entities("cogvideox")),
    ("hunyuan", "entity prompts", _entities("hunyuan")),
    ("ltx", "image-to-video", _ltx_image),
    ("mochi", "entity prompts", _entities("mochi")),
)
"""A pipeline, what is tried on it, and the trial."""


def sentence(trial: Callable[[], Any]) -> str:
    """What the library says to it, without the list of what it supports. Raises AssertionError when it says nothing."""
    try:
        trial()
    except ControlError as error:
        return str(error).partition(": supported are ")[0].rstrip(".") + "."
    raise AssertionError("nothing was refused")
