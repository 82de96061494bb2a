"""The registry as tests use it: every method made with something to do, and made to do nothing."""

from __future__ import annotations

from typing import Any

import attnctrl as ac
from attnctrl.controls import REGISTRY, Method
from tests.probes import REGIONS

# Parameters under which a method asks for nothing: the picture must be the stock one, bit for bit.
WEIGHTLESS: dict[str, list[dict[str, Any]]] = {
    "region-mask": [{"weight": 0.0, "boost": 0.0}],
    "region-prompts": [{"base_ratio": 1.0}],
    "dense-diffusion": [{"cross_weight": 0.0, "self_weight": 0.0}],
    "refocus": [{"scale": 0.0}, {"cross_weight": 0.0, "self_weight": 0.0}],
    "loco": [{"scale": 0.0}, {"iterations": 0}],
    "attend-excite": [{"scale": 0.0}, {"iterations": 0}],
    "a-star": [{"scale": 0.0}, {"iterations": 0}, {"segregation_weight": 0.0, "retention_weight": 0.0}],
}


def subject(method: Method) -> Any:
    """What the method is about: the regions, or the phrases of the regions."""
    if "regions" in method.control.__dataclass_fields__:
        return REGIONS
    return tuple(region.phrase for region in REGIONS)


def busy(name: str, **params: Any) -> ac.Control:
    """The method at work in every step of the run."""
    return REGISTRY[name].make(subject(REGISTRY[name]), **{"window": ac.Window(0.0, 1.0)} | params)


def idle_forms() -> dict[str, ac.Control]:
    """Every way of asking a registered method for nothing, by a readable name."""
    forms = {}
    for name, method in REGISTRY.items():
        for params in WEIGHTLESS[name]:
            forms[f"{name}-{'-'.join(params)}"] = busy(name, **params)
        forms[f"{name}-no-subject"] = method.make(())
        forms[f"{name}-no-subject-per-prompt"] = method.make(((),))
        forms[f"{name}-empty-window"] = busy(name, window=ac.Window(0.5, 0.5))
    return forms
