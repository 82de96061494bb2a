"""The shapes world: small trained diffusion models whose images can be judged exactly.

Importing this needs numpy and torch only; diffusers is imported by `load`, training code by whoever trains.
"""

from .captions import phrase, prompt_for
from .detect import Detection, Found, detect
from .layouts import Layout, sample_layout
from .pretrained import load, weights_path
from .render import render, thing_mask
from .score import Score, bound, extra, fitted_iou, in_box, iou, leaked, neglected, present, score_image
from .world import BACKGROUNDS, COLOURS, HELD_OUT, SHAPES, Scene, Thing, sample_scene, scene_rng

__all__ = [
    "BACKGROUNDS", "COLOURS", "HELD_OUT", "SHAPES", "Detection", "Found", "Layout", "Scene", "Score", "Thing",
    "bound", "detect", "extra", "fitted_iou", "in_box", "iou", "leaked", "load", "neglected", "phrase",
    "present", "prompt_for", "render", "sample_layout", "sample_scene", "scene_rng", "score_image", "thing_mask",
    "weights_path",
]  # fmt: skip
