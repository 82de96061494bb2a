"""Pipeline nodes: attnctrl's own pipelines in ComfyUI, for what needs gradients, several passes or a given picture."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch

from attnctrl.controls import REGISTRY, Method
from attnctrl.errors import ControlError
from attnctrl.fields import arguments, paper_link, parameters
from attnctrl.install import share
from attnctrl.models import call_arguments, load_pipeline
from attnctrl.nodes.forms import METHODS, PIPELINE, Node, Port, form, number, read, regions_port, text
from attnctrl.nodes.pictures import as_image
from attnctrl.nodes.places import Place
from attnctrl.nouns import find_pairs
from attnctrl.run import control

Chosen = tuple[tuple[str, Mapping[str, Any]], ...]
"""Methods in order, each with the arguments of its class."""
CATEGORY = "attnctrl/pipelines"
SEED = 2**53 - 1


def with_gradients(run: Callable[..., Any]) -> Callable[..., Any]:
    """Outside ComfyUI's inference mode, under which neither weights nor latents could take part in a loss."""

    @wraps(run)
    def outside(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return run(*args, **kwargs)

    return outside


@with_gradients
def load(model: str, device: str) -> tuple[Any]:
    """A diffusers pipeline: a shipped model by name, a folder or a hub id."""
    pipe = load_pipeline(model.strip(), device=None if device == "auto" else device)
    pipe.set_progress_bar_config(disable=True)
    return (pipe,)


def choose(of: Method, files: Mapping[str, Path], methods: Chosen = (), **given: Any) -> tuple[Chosen]:
    """The methods so far and one more. Raises ControlError for values out of range and for unknown files."""
    return ((*(methods or ()), (of.name, arguments(of.name, parameters(of.name, read(of, given)), {}, files))),)


def chosen(methods: Chosen | None, tasks: tuple[str, ...], where: str) -> dict[str, Mapping[str, Any]]:
    """Methods with their arguments. Raises ControlError for one of another task, and one given twice."""
    found: dict[str, Mapping[str, Any]] = {}
    for name, given in methods or ():
        if REGISTRY[name].task not in tasks:
            raise ControlError(
                f"{name} is for {REGISTRY[name].task}, and {where} takes methods for {', '.join(tasks)}: connect it to "
                "the node for its task."
            )
        if name in found:
            raise ControlError(f"{name} is connected twice: give it once.")
        found[name] = given
    return found


def lines(given: str) -> list[str]:
    """The lines of a text that hold something."""
    return [line.strip() for line in given.splitlines() if line.strip()]


def ticking(pipe: Any, tick: Callable[[int, int], None]) -> dict[str, Any]:
    """The argument of a pipeline's call that tells the host of each step, where the pipeline has one."""

    def after_step(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        tick(index + 1, int(pipe.num_timesteps))
        return {}

    has = "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters
    return {"callback_on_step_end": after_step} if has else {}


def size_of(width: int, height: int) -> dict[str, int]:
    """Sides as arguments of a call; 0 is the pipeline's own."""
    return {name: side for name, side in (("width", width), ("height", height)) if side}


DRAWS = ("layout", "fidelity", "guidance", "sparse")


@with_gradients
def draw(
    pipeline: Any,
    prompt: str,
    steps: int,
    guidance: float,
    seed: int,
    width: int,
    height: int,
    phrases: str,
    tick: Callable[[int, int], None],
    methods: Chosen = (),
    regions: tuple[Place, ...] = (),
) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Pictures, or the frames of a clip; a sheet of heat maps of the phrases; and the run's report."""
    places, named = [place.region() for place in regions or ()], lines(phrases)
    controls = []
    for name, given in chosen(methods, DRAWS, "Draw").items():
        of = REGISTRY[name]
        subject: dict[str, Any] = {}
        if "regions" in of.settings:
            if not places:
                raise ControlError(f"{name} places objects in regions: connect at least one.")
            subject["regions"] = places
        if "phrases" in of.settings and (named or of.control.__dataclass_fields__["phrases"].default is not None):
            subject["phrases"] = named or [p.phrase for p in places] or [p.noun.text for p in find_pairs(prompt)]
        controls.append(of.make(**given, **subject))
    pipe = share(pipeline)
    call = {
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(seed),
        **size_of(width, height),
        **ticking(pipe, tick),
    }
    maps = named or [p.phrase for p in places if p.phrase in prompt]
    with control(pipe, *controls, record=maps or False) as run:
        result = pipe(**call_arguments(pipe, prompt, guidance or None, call))
    drawn = result.images if hasattr(result, "images") else result.frames[0]
    sheet = run.maps.overlays(drawn[0]) if maps and hasattr(result, "images") else drawn[0]
    return as_image(drawn), as_image([sheet]), str(run.report)


def sampled(steps: int = 25) -> tuple[Port, ...]:
    """The ports that every run has."""
    return (
        number("steps", steps, 1, 1000, "of the sampler"),
        number("guidance", 3.5, 0.0, 100.0, "scale under whatever name the pipeline has for it; 0: its default"),
        number("seed", 0, 0, SEED, "of the noise"),
    )


def pipeline_port() -> Port:
    return Port("pipeline", PIPELINE, "from the node Load pipeline")


def methods_port() -> Port:
    return Port("methods", METHODS, "from the nodes of single methods", optional=True)


REPORT = Port("report", "STRING", "what acted where, and what it cost")


def _method_node(of: Method) -> Node:
    return Node(
        f"AttnCtrlMethod{of.control.__name__}",
        f"{of.name} (attnctrl method)",
        f"attnctrl/methods/{of.task}",
        f"{of.control.fixes}. {paper_link(of)}",
        (*form(of), methods_port()),
        (Port("methods", METHODS),),
        partial(choose, of),
        ("files",),
        of.name,
    )


NODES = (
    Node(
        "AttnCtrlLoadPipeline",
        "Load pipeline (attnctrl)",
        CATEGORY,
        "A diffusers pipeline: shapes-sd and shapes-dit ship with attnctrl; else a folder or a hub id.",
        (text("model", "shapes-sd"), Port("device", "COMBO", default="auto", choices=("auto", "cpu", "cuda"))),
        (Port("pipeline", PIPELINE),),
        load,
    ),
    Node(
        "AttnCtrlDraw",
        "Draw (attnctrl)",
        CATEGORY,
        "Draws a prompt under methods for layout, fidelity, guidance and sparse attention.",
        (
            pipeline_port(),
            text("prompt", lines=True),
            *sampled(),
            number("width", 0, 0, 4096, "pixels; 0: the pipeline's own"),
            number("height", 0, 0, 4096, "pixels; 0: the pipeline's own"),
            text("phrases", about="words of the prompt, one phrase a line: for heat maps and methods without regions",
                 lines=True),
            methods_port(),
            regions_port(optional=True),
        ),
        (Port("images", "IMAGE"), Port("maps", "IMAGE"), REPORT),
        draw,
        ("tick",),
    ),
    *(_method_node(of) for of in REGISTRY.values()),
)  # fmt: skip
