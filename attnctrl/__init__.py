"""Attention control for diffusion models: every method behind one small interface, on stock diffusers pipelines."""

from importlib.metadata import version

from attnctrl.control import Control, Descent, Loss, Where, Window
from attnctrl.controls import (
    RAG,
    AgentAttention,
    AStar,
    AttendExcite,
    BundledAttention,
    Conform,
    DenseDiffusion,
    DivideBind,
    Draft,
    DynamicPrompt,
    EliGen,
    InitNO,
    InpaintFusion,
    LayoutGuidance,
    LoCo,
    NeighborhoodTiles,
    OptiPrune,
    OracleBlocks,
    Paro,
    Radial,
    RandomBlocks,
    Refocus,
    RegionalFlux,
    RegionMask,
    RegionPrompts,
    Rettention,
    SlidingTile,
    VMoBA,
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
    "AgentAttention",
    "AttendExcite",
    "BundledAttention",
    "Conform",
    "Control",
    "ControlError",
    "DenseDiffusion",
    "Descent",
    "DivideBind",
    "Draft",
    "DynamicPrompt",
    "EliGen",
    "InitNO",
    "InpaintFusion",
    "LayoutGuidance",
    "LoCo",
    "Loss",
    "NeighborhoodTiles",
    "OptiPrune",
    "OracleBlocks",
    "Paro",
    "Radial",
    "RandomBlocks",
    "Refocus",
    "Region",
    "RegionMask",
    "RegionPrompts",
    "RegionalFlux",
    "Rettention",
    "Run",
    "SlidingTile",
    "VMoBA",
    "Where",
    "Window",
    "control",
    "find_pairs",
    "share",
]
