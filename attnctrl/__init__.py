"""Attention control for diffusion models: every method behind one small interface, on stock diffusers pipelines."""

from importlib.metadata import version

from attnctrl.control import Control, Descent, Loss, Where, Window
from attnctrl.controls import (
    RAG,
    AleEdit,
    AStar,
    AttendExcite,
    BundledAttention,
    Conform,
    DenseDiffusion,
    DivideBind,
    DynamicPrompt,
    EliGen,
    FollowSource,
    InitNO,
    InpaintFusion,
    LayoutGuidance,
    LoCo,
    MultiMaskInpaint,
    MutualSelfAttention,
    NullText,
    OptiPrune,
    PromptToPrompt,
    Refocus,
    RegionalFlux,
    RegionMask,
    RegionPrompts,
    SemanticProtection,
    SourceBlend,
    SourceGuidance,
    TowardNoise,
    TowardPicture,
    VirtualInversion,
)
from attnctrl.edits import Edit
from attnctrl.errors import ControlError
from attnctrl.install import share
from attnctrl.nouns import find_pairs
from attnctrl.regions import Region
from attnctrl.run import Run, control

__version__ = version("attnctrl")
__all__ = [
    "AStar",
    "AleEdit",
    "AttendExcite",
    "BundledAttention",
    "Conform",
    "Control",
    "ControlError",
    "DenseDiffusion",
    "Descent",
    "DivideBind",
    "DynamicPrompt",
    "Edit",
    "EliGen",
    "FollowSource",
    "InitNO",
    "InpaintFusion",
    "LayoutGuidance",
    "LoCo",
    "Loss",
    "MultiMaskInpaint",
    "MutualSelfAttention",
    "NullText",
    "OptiPrune",
    "PromptToPrompt",
    "RAG",
    "Refocus",
    "Region",
    "RegionMask",
    "RegionPrompts",
    "RegionalFlux",
    "Run",
    "SemanticProtection",
    "SourceBlend",
    "SourceGuidance",
    "TowardNoise",
    "TowardPicture",
    "VirtualInversion",
    "Where",
    "Window",
    "control",
    "find_pairs",
    "share",
]
