"""The registry: every method by the name that the command line, the benchmarks and the interfaces use."""

from __future__ import annotations

from dataclasses import Field, dataclass, fields
from typing import Any

from attnctrl.control import Control, Where
from attnctrl.controls.editing.ale_edit import AleEdit
from attnctrl.controls.editing.controlled_flow import TowardNoise, TowardPicture
from attnctrl.controls.editing.design_edit import DesignEdit
from attnctrl.controls.editing.focus_on_instruction import FocusOnInstruction
from attnctrl.controls.editing.follow_source import FollowSource
from attnctrl.controls.editing.inpaint_fusion import InpaintFusion
from attnctrl.controls.editing.lime import Lime
from attnctrl.controls.editing.multi_mask_inpaint import MultiMaskInpaint
from attnctrl.controls.editing.mutual_self_attention import MutualSelfAttention
from attnctrl.controls.editing.null_text import NullText
from attnctrl.controls.editing.plug_and_play import PlugAndPlay
from attnctrl.controls.editing.prime_composer import PrimeComposer
from attnctrl.controls.editing.prompt_to_prompt import PromptToPrompt
from attnctrl.controls.editing.source_blend import SourceBlend
from attnctrl.controls.editing.source_guidance import SourceGuidance
from attnctrl.controls.editing.virtual_inversion import VirtualInversion
from attnctrl.controls.fidelity.a_star import AStar
from attnctrl.controls.fidelity.attend_excite import AttendExcite
from attnctrl.controls.fidelity.bundled_attention import BundledAttention
from attnctrl.controls.fidelity.conform import Conform
from attnctrl.controls.fidelity.divide_bind import DivideBind
from attnctrl.controls.fidelity.dynamic_prompt import DynamicPrompt
from attnctrl.controls.fidelity.init_no import InitNO
from attnctrl.controls.fidelity.opti_prune import OptiPrune
from attnctrl.controls.fidelity.semantic_protection import SemanticProtection
from attnctrl.controls.guidance.self_attention_guidance import SelfAttentionGuidance
from attnctrl.controls.guidance.semantic_cfg import SemanticCFG
from attnctrl.controls.guidance.soft_pag import SoftPAG
from attnctrl.controls.layout.dense_diffusion import DenseDiffusion
from attnctrl.controls.layout.eligen import EliGen
from attnctrl.controls.layout.layout_guidance import LayoutGuidance
from attnctrl.controls.layout.loco import LoCo
from attnctrl.controls.layout.rag import RAG
from attnctrl.controls.layout.refocus import Refocus
from attnctrl.controls.layout.region_mask import RegionMask
from attnctrl.controls.layout.region_prompts import RegionPrompts
from attnctrl.controls.layout.regional_flux import RegionalFlux
from attnctrl.controls.readout.correspond import Correspond
from attnctrl.controls.readout.hold_picture import HoldPicture
from attnctrl.controls.readout.segment import Segment
from attnctrl.controls.readout.segment_like_me import SegmentLikeMe
from attnctrl.controls.sparse.agent_attention import AgentAttention
from attnctrl.controls.sparse.draft import Draft
from attnctrl.controls.sparse.neighborhood_tiles import NeighborhoodTiles
from attnctrl.controls.sparse.oracle_blocks import OracleBlocks
from attnctrl.controls.sparse.paro import Paro
from attnctrl.controls.sparse.planned import Planned
from attnctrl.controls.sparse.radial import Radial
from attnctrl.controls.sparse.random_blocks import RandomBlocks
from attnctrl.controls.sparse.rettention import Rettention
from attnctrl.controls.sparse.sliding_tile import SlidingTile
from attnctrl.controls.sparse.vmoba import VMoBA
from attnctrl.controls.subjects.appearance_matching import AppearanceMatching
from attnctrl.controls.subjects.consistent_self_attention import ConsistentSelfAttention
from attnctrl.controls.subjects.delayed_subject import DelayedSubject
from attnctrl.controls.subjects.draw_references import DrawReferences
from attnctrl.controls.subjects.in_context_mask import InContextMask
from attnctrl.controls.subjects.isolation_reposition import IsolationReposition
from attnctrl.controls.subjects.localized_residual import LocalizedResidual
from attnctrl.controls.subjects.magic_face import MagicFace
from attnctrl.controls.subjects.masked_adain import MaskedAdaIN
from attnctrl.controls.subjects.masked_reference import MaskedReference
from attnctrl.controls.subjects.object_masks import ObjectMasks
from attnctrl.controls.subjects.persona_hoi import PersonaHOI
from attnctrl.controls.subjects.shared_attention import SharedAttention
from attnctrl.controls.subjects.time_aware_reference import TimeAwareReference
from attnctrl.errors import ControlError


@dataclass(frozen=True)
class Method:
    """A registered method: its name, its class and the task it belongs to."""

    name: str
    control: type[Control]
    task: str

    @property
    def params(self) -> dict[str, Field]:
        """The documented parameters, by name; their metadata holds help text, range and choices."""
        return {f.name: f for f in fields(self.control) if "help" in f.metadata}

    @property
    def settings(self) -> tuple[str, ...]:
        """Everything that can be set, the subject included, by name."""
        return tuple(f.name for f in fields(self.control))

    @property
    def where(self) -> Where:
        """The sites that the method acts on by default."""
        default: Any = self.control.__dataclass_fields__["where"].default
        return default

    def make(self, *args: Any, **params: Any) -> Control:
        """The control. Raises ControlError for parameters that the method does not have."""
        unknown = [name for name in params if name not in self.settings]
        if unknown:
            raise ControlError(
                f'method "{self.name}" has no parameter "{unknown[0]}": it has {", ".join(self.params)}, window, where.'
            )
        return self.control(*args, **params)


REGISTRY = {
    method.name: method
    for method in (
        Method("region-mask", RegionMask, "layout"),
        Method("region-prompts", RegionPrompts, "layout"),
        Method("dense-diffusion", DenseDiffusion, "layout"),
        Method("layout-guidance", LayoutGuidance, "layout"),
        Method("refocus", Refocus, "layout"),
        Method("loco", LoCo, "layout"),
        Method("eligen", EliGen, "layout"),
        Method("regional-flux", RegionalFlux, "layout"),
        Method("rag", RAG, "layout"),
        Method("attend-excite", AttendExcite, "fidelity"),
        Method("a-star", AStar, "fidelity"),
        Method("conform", Conform, "fidelity"),
        Method("divide-bind", DivideBind, "fidelity"),
        Method("init-no", InitNO, "fidelity"),
        Method("bundled-attention", BundledAttention, "fidelity"),
        Method("dynamic-prompt", DynamicPrompt, "fidelity"),
        Method("opti-prune", OptiPrune, "fidelity"),
        Method("semantic-protection", SemanticProtection, "fidelity"),
        Method("inpaint-fusion", InpaintFusion, "editing"),
        Method("prompt-to-prompt", PromptToPrompt, "editing"),
        Method("mutual-self-attention", MutualSelfAttention, "editing"),
        Method("ale-edit", AleEdit, "editing"),
        Method("multi-mask-inpaint", MultiMaskInpaint, "editing"),
        Method("focus-on-instruction", FocusOnInstruction, "editing"),
        Method("lime", Lime, "editing"),
        Method("plug-and-play", PlugAndPlay, "editing"),
        Method("design-edit", DesignEdit, "editing"),
        Method("prime-composer", PrimeComposer, "editing"),
        Method("soft-pag", SoftPAG, "guidance"),
        Method("self-attention-guidance", SelfAttentionGuidance, "guidance"),
        Method("semantic-cfg", SemanticCFG, "guidance"),
        Method("segment", Segment, "readout"),
        Method("segment-like-me", SegmentLikeMe, "readout"),
        Method("correspond", Correspond, "readout"),
        Method("magic-face", MagicFace, "subjects"),
        Method("isolation-reposition", IsolationReposition, "subjects"),
        Method("appearance-matching", AppearanceMatching, "subjects"),
        Method("consistent-self-attention", ConsistentSelfAttention, "subjects"),
        Method("shared-attention", SharedAttention, "subjects"),
        Method("delayed-subject", DelayedSubject, "subjects"),
        Method("masked-reference", MaskedReference, "subjects"),
        Method("time-aware-reference", TimeAwareReference, "subjects"),
        Method("object-masks", ObjectMasks, "subjects"),
        Method("in-context-mask", InContextMask, "subjects"),
        Method("localized-residual", LocalizedResidual, "subjects"),
        Method("masked-adain", MaskedAdaIN, "subjects"),
        Method("persona-hoi", PersonaHOI, "subjects"),
        Method("radial", Radial, "sparse"),
        Method("neighborhood-tiles", NeighborhoodTiles, "sparse"),
        Method("sliding-tile", SlidingTile, "sparse"),
        Method("draft", Draft, "sparse"),
        Method("paro", Paro, "sparse"),
        Method("rettention", Rettention, "sparse"),
        Method("vmoba", VMoBA, "sparse"),
        Method("agent-attention", AgentAttention, "sparse"),
        Method("planned", Planned, "sparse"),
        Method("random-blocks", RandomBlocks, "sparse"),
        Method("oracle-blocks", OracleBlocks, "sparse"),
    )
}


def method(name: str) -> Method:
    """The method called `name`. Raises ControlError for unknown names, listing the known ones."""
    if name not in REGISTRY:
        raise ControlError(f'method "{name}" is unknown: choose one of {", ".join(REGISTRY)}.')
    return REGISTRY[name]


__all__ = [
    "RAG",
    "REGISTRY",
    "AStar",
    "AleEdit",
    "AgentAttention",
    "AttendExcite",
    "AppearanceMatching",
    "ConsistentSelfAttention",
    "DelayedSubject",
    "IsolationReposition",
    "MaskedAdaIN",
    "MaskedReference",
    "SharedAttention",
    "BundledAttention",
    "Conform",
    "Correspond",
    "DenseDiffusion",
    "DesignEdit",
    "DivideBind",
    "Draft",
    "DrawReferences",
    "DynamicPrompt",
    "EliGen",
    "FocusOnInstruction",
    "FollowSource",
    "HoldPicture",
    "InitNO",
    "InpaintFusion",
    "LayoutGuidance",
    "Lime",
    "LoCo",
    "MagicFace",
    "Method",
    "MultiMaskInpaint",
    "MutualSelfAttention",
    "NullText",
    "OptiPrune",
    "PlugAndPlay",
    "PrimeComposer",
    "PromptToPrompt",
    "NeighborhoodTiles",
    "OracleBlocks",
    "Paro",
    "PersonaHOI",
    "Planned",
    "Radial",
    "RandomBlocks",
    "Refocus",
    "RegionMask",
    "RegionPrompts",
    "RegionalFlux",
    "Segment",
    "SegmentLikeMe",
    "SemanticProtection",
    "SoftPAG",
    "SelfAttentionGuidance",
    "SemanticCFG",
    "SourceBlend",
    "SourceGuidance",
    "TowardNoise",
    "TowardPicture",
    "VirtualInversion",
    "Rettention",
    "SlidingTile",
    "VMoBA",
    "method",
]
