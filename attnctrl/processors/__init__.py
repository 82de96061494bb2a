"""One file per model family; this table finds the one that fits a pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any

from attnctrl.errors import ControlError

if TYPE_CHECKING:
    from attnctrl.processors.family import Family

FAMILIES = {
    "unet": "UNetFamily",
    "flux": "FluxFamily",
    "sd3": "SD3Family",
    "qwen": "QwenFamily",
    "pixart": "PixArtFamily",
    "sana": "SanaFamily",
    "flux2": "Flux2Family",
    "zimage": "ZImageFamily",
    "wan": "WanFamily",
    "cogvideox": "CogVideoXFamily",
    "hunyuan": "HunyuanFamily",
    "ltx": "LTXFamily",
    "mochi": "MochiFamily",
}
"""The class of each family by its module, imported when a pipeline asks: each brings its model's code along."""


def families() -> Iterator[Any]:
    """The classes of the families, imported one by one."""
    for module, name in FAMILIES.items():
        yield getattr(import_module(f"attnctrl.processors.{module}"), name)


def family_of(pipe: Any) -> Family:
    """The family of `pipe`. Raises ControlError for models without support."""
    for family in families():
        if family.fits(pipe):
            return family(pipe)
    model = next(
        (getattr(pipe, n) for n in ("transformer", "unet", "prior") if getattr(pipe, n, None) is not None),
        None,
    )
    raise ControlError(
        f"{type(pipe).__name__} with {type(model).__name__} is not supported yet: supported are "
        + "; ".join(family.describes for family in families())
        + "."
    )


def attention_kinds(pipe: Any) -> set[str]:
    """The kinds of attention layers that can be controlled: any of "self", "cross", "joint". Raises as `family_of`."""
    return {site.kind for site, _ in family_of(pipe).sites()}


__all__ = ["FAMILIES", "attention_kinds", "families", "family_of"]
