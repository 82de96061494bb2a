"""Native nodes: controls inside ComfyUI's own models, on the MODEL that core nodes load and sample."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from attnctrl.controls import REGISTRY, Method
from attnctrl.fields import make, paper_link, parameters
from attnctrl.nodes.forms import (
    MAPS,
    REGIONS,
    WORDS,
    Node,
    Port,
    form,
    model_port,
    number,
    read,
    regions_port,
    text,
    words_port,
)
from attnctrl.nodes.models import why_not
from attnctrl.nodes.pictures import heat_maps
from attnctrl.nodes.places import by_text, by_words, region
from attnctrl.nodes.plan import Asked, Recorded, patched, plan_of
from attnctrl.nodes.runs import run_of
from attnctrl.nodes.words import Words

NATIVE: dict[str, Callable[..., Any] | None] = {
    "region-mask": by_words,
    "region-prompts": by_text,
    "dense-diffusion": by_words,
    "soft-pag": None,
    "radial": None,
    "draft": None,
    "neighborhood-tiles": None,
}
"""The registered methods with a native node, and how their regions are tied to a prompt."""
logger = logging.getLogger("attnctrl.nodes")
CATEGORY = "attnctrl/native"


def under_control(of: Method, model: Any, calc_cond_batch: Any = None, **given: Any) -> tuple[Any]:
    """A clone of a ModelPatcher under one method more; the model itself where the method asks for nothing.

    It is given back as it is, with a reason in the log, where the method does not work in such a model.
    Raises ControlError for bad parameters and regions, and for two methods that cannot work together.
    """
    places, words, tie = given.pop("regions", None), given.pop("words", None), NATIVE[of.name]
    placed = None if tie is None else tie(places or (), words)
    subject = {} if placed is None else {"regions": placed.regions}
    control = make(of.name, parameters(of.name, read(of, given)), subject, {})
    if control.idle:
        return (model,)
    points = control.points()
    network = model.get_model_object("diffusion_model")
    reason = why_not(network, control.where.kinds, *(of.name == "region-prompts",) * 2)
    if reason:
        logger.warning("attnctrl: %s is left out: %s.", control.name, reason)
        return (model,)
    asked = Asked(control, placed, words)
    clone = patched(model, plan_of(model).also(asked))
    if "guide" in points:
        # A plain function: ComfyUI copies the options of a model deeply with every clone, but no functions.
        def guide(args: dict[str, Any]) -> Any:
            return run_of(args["model_options"]).guided(asked, args, calc_cond_batch)

        clone.set_model_sampler_post_cfg_function(guide)
    return (clone,)


def prompt_with_words(clip: Any, prompt: str) -> tuple[Any, Words]:
    """The conditioning of a prompt, and where its words stand in it."""
    words = Words.of(clip, prompt)
    return words.conditioning, words


def record(model: Any, words: Words, phrases: str) -> tuple[Any, Recorded]:
    """A clone of a ModelPatcher that keeps the attention maps of phrases, one a line.

    Raises ControlError for a phrase that is not in the prompt.
    """
    recorded = Recorded()
    spelled = tuple(words.spelled(line) for line in phrases.splitlines() if line.strip())
    reason = why_not(model.get_model_object("diffusion_model"), ("cross", "joint"), False, False)
    if reason or not spelled:
        logger.warning("attnctrl: no maps are recorded: %s.", reason or "no phrase is named")
        return model, recorded
    return patched(model, plan_of(model).recording(spelled, words, recorded)), recorded


def _node(name: str) -> Node:
    of, tie = REGISTRY[name], NATIVE[name]
    regions = () if tie is None else (regions_port(), words_port(optional=tie is by_text))
    title = name.replace("-", " ").capitalize()
    return Node(
        id=f"AttnCtrl{of.control.__name__}",
        title=f"{title} (attnctrl)",
        category=CATEGORY,
        about=f"{of.control.fixes}. {paper_link(of)}",
        inputs=(model_port(), *regions, *form(of)),
        outputs=(Port("model", "MODEL"),),
        run=partial(under_control, of),
        needs=("calc_cond_batch",) if name == "soft-pag" else (),
        method=name,
    )


NODES = (
    Node(
        "AttnCtrlRegion",
        "Region (attnctrl)",
        "attnctrl",
        "One region more: words of the prompt, and a mask or a box in fractions of the picture.",
        (
            text("phrase", about="words of the prompt that belong there"),
            number("weight", 1.0, 0, 100, "relative weight where regions are merged"),
            text("prompt", about="the region's own text, for methods that have one; empty: the phrase"),
            *(
                number(name, default, 0, 1, f"{edge} edge of the box, where no mask is connected")
                for name, default, edge in (
                    ("x0", 0.0, "left"), ("y0", 0.0, "upper"), ("x1", 1.0, "right"), ("y1", 1.0, "lower"),
                )
            ),
            Port("mask", "MASK", "above half is inside", optional=True),
            Port("conditioning", "CONDITIONING", "the region's own prompt, for native nodes", optional=True),
            regions_port(optional=True),
        ),
        (Port("regions", REGIONS),),
        region,
    ),
    Node(
        "AttnCtrlPromptWords",
        "Prompt with words (attnctrl)",
        CATEGORY,
        "Encodes a prompt as CLIP Text Encode does, and keeps where its words stand.",
        (Port("clip", "CLIP"), text("prompt", lines=True)),
        (Port("conditioning", "CONDITIONING"), Port("words", WORDS)),
        prompt_with_words,
    ),
    *(_node(name) for name in NATIVE),
    Node(
        "AttnCtrlRecordMaps",
        "Record attention maps (attnctrl)",
        CATEGORY,
        "Keeps where the attention to words of the prompt goes; the picture stays as it is.",
        (model_port(), words_port(), text("phrases", about="words of the prompt, one phrase a line", lines=True)),
        (Port("model", "MODEL"), Port("maps", MAPS)),
        record,
    ),
    Node(
        "AttnCtrlHeatMaps",
        "Attention heat maps (attnctrl)",
        CATEGORY,
        "The recorded maps laid over the pictures, and as masks, phrase by phrase.",
        (
            Port("maps", MAPS),
            Port("image", "IMAGE", "the pictures of this very sampling: so the maps are read when they are there"),
            number("strength", 0.6, 0, 1, "of the colours over the picture"),
        ),
        (Port("image", "IMAGE"), Port("mask", "MASK")),
        heat_maps,
    ),
)  # fmt: skip
