"""Attention control for diffusion models: every method behind one small interface, on stock diffusers pipelines."""

from importlib.metadata import version

from attnctrl.control import Control, Descent, Loss, Where, Window
from attnctrl.controls import (
    RAG,
    AStar,
    AttendExcite,
    DenseDiffusion,
    EliGen,
    InpaintFusion,
    LayoutGuidance,
    LoCo,
    Refocus,
    RegionalFlux,
    RegionMask,
    RegionPrompts,
)
from attnctrl.errors import ControlError
from attnctrl.install import share
from attnctrl.regions import Region
from attnctrl.run import Run, control

__version__ = version("attnctrl")
__all__ = [
    "RAG",
    "AStar",
    "AttendExcite",
    "Control",
    "ControlError",
    "DenseDiffusion",
    "Descent",
    "EliGen",
    "InpaintFusion",
    "LayoutGuidance",
    "LoCo",
    "Loss",
    "Refocus",
    "Region",
    "RegionMask",
    "RegionPrompts",
    "RegionalFlux",
    "Run",
    "Where",
    "Window",
    "control",
    "share",
]
