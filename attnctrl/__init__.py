"""Attention control for diffusion models: every method behind one small interface, on stock diffusers pipelines."""

from importlib.metadata import version

from attnctrl.control import Control, Descent, Loss, Where, Window
from attnctrl.controls import (
    RAG,
    AStar,
    AttendExcite,
    BundledAttention,
    Conform,
    DenseDiffusion,
    DivideBind,
    DynamicPrompt,
    EliGen,
    InitNO,
    InpaintFusion,
    LayoutGuidance,
    LoCo,
    OptiPrune,
    Refocus,
    RegionalFlux,
    RegionMask,
    RegionPrompts,
)
from attnctrl.errors import ControlError
from attnctrl.install import share
from attnctrl.nouns import find_pairs
from attnctrl.regions import Region
from attnctrl.run import Run, control

__version__ = version("attnctrl")
__all__ = [
    "RAG",
    "AStar",
    "AttendExcite",
    "BundledAttention",
    "Conform",
    "Control",
    "ControlError",
    "DenseDiffusion",
    "Descent",
    "DivideBind",
    "DynamicPrompt",
    "EliGen",
    "InitNO",
    "InpaintFusion",
    "LayoutGuidance",
    "LoCo",
    "Loss",
    "OptiPrune",
    "Refocus",
    "Region",
    "RegionMask",
    "RegionPrompts",
    "RegionalFlux",
    "Run",
    "Where",
    "Window",
    "control",
    "find_pairs",
    "share",
]
