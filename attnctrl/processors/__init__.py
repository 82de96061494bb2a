"""One file per model family; this table finds the one that fits a pipeline."""

from __future__ import annotations

from typing import Any

from attnctrl.errors import ControlError
from attnctrl.processors.cogvideox import CogVideoXFamily
from attnctrl.processors.family import Family
from attnctrl.processors.flux import FluxFamily
from attnctrl.processors.flux2 import Flux2Family
from attnctrl.processors.hunyuan import HunyuanFamily
from attnctrl.processors.ltx import LTXFamily
from attnctrl.processors.mochi import MochiFamily
from attnctrl.processors.pixart import PixArtFamily
from attnctrl.processors.qwen import QwenFamily
from attnctrl.processors.sana import SanaFamily
from attnctrl.processors.sd3 import SD3Family
from attnctrl.processors.unet import UNetFamily
from attnctrl.processors.wan import WanFamily
from attnctrl.processors.zimage import ZImageFamily

FAMILIES: tuple[Any, ...] = (
    UNetFamily,
    FluxFamily,
    SD3Family,
    QwenFamily,
    PixArtFamily,
    SanaFamily,
    Flux2Family,
    ZImageFamily,
    WanFamily,
    CogVideoXFamily,
    HunyuanFamily,
    LTXFamily,
    MochiFamily,
)


def family_of(pipe: Any) -> Family:
    """The family of `pipe`. Raises ControlError for models without support."""
    for family in FAMILIES:
        if family.fits(pipe):
            return family(pipe)
    model = next(
        (getattr(pipe, n) for n in ("transformer", "unet", "prior") if getattr(pipe, n, None) is not None),
        None,
    )
    raise ControlError(
        f"{type(pipe).__name__} with {type(model).__name__} is not supported yet: supported are "
        + "; ".join(family.describes for family in FAMILIES)
        + "."
    )


def attention_kinds(pipe: Any) -> set[str]:
    """The kinds of attention layers that can be controlled: any of "self", "cross", "joint". Raises as `family_of`."""
    return {site.kind for site, _ in family_of(pipe).sites()}


__all__ = ["FAMILIES", "attention_kinds", "family_of"]
