"""The shapes world: small trained diffusion models whose images can be judged exactly.

Importing this needs numpy and torch only; diffusers is imported by `load`, training code by whoever trains.
"""

from .captions import phrase, prompt_for
from .captions_video import clip_prompt
from .detect import Detection, Found, detect
from .instructions import instruction_for
from .layouts import Layout, sample_layout
from .motion import MOTIONS, Clip, Mover, sample_clip
from .pretrained import VIDEO_CALL, load, weights_path
from .render import render, render_clip, thing_mask
from .score import Score, bound, extra, fitted_iou, in_box, iou, leaked, neglected, present, score_image
from .score_clip import ClipScore, score_clip
from .world import BACKGROUNDS, COLOURS, HELD_OUT, SHAPES, Scene, Thing, sample_scene, scene_rng

__all__ = [
    "BACKGROUNDS", "COLOURS", "HELD_OUT", "MOTIONS", "SHAPES", "VIDEO_CALL", "Clip", "ClipScore", "Detection", "Found",
    "Layout", "Mover", "Scene", "Score", "Thing", "bound", "clip_prompt", "detect", "extra", "fitted_iou", "in_box",
    "instruction_for", "iou", "leaked", "load", "neglected", "phrase", "present", "prompt_for", "render", "render_clip",
    "sample_clip", "sample_layout", "sample_scene", "scene_rng", "score_clip", "score_image", "thing_mask",
    "weights_path",
]  # fmt: skip
