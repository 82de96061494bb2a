"""Example workflows: each said once as a graph, and written in both of ComfyUI's forms."""

from __future__ import annotations

from typing import Any

from attnctrl.nodes.catalog import NODES
from attnctrl.nodes.forms import Node, Port

Graph = dict[str, tuple[str, dict[str, Any]]]
"""By number: the node's id and its inputs; a link is a list [number, output]."""

PROMPT = "a red circle and a blue square on a white background"
PLACES = {"r1": ("a red circle", 0.05, 0.1, 0.45, 0.6), "r2": ("a blue square", 0.55, 0.4, 0.95, 0.9)}


def _regions(**more: Any) -> Graph:
    found: Graph = {}
    for name, (phrase, x0, y0, x1, y1) in PLACES.items():
        before = {"regions": [list(found)[-1], 0]} if found else {}
        found[name] = ("AttnCtrlRegion", {"phrase": phrase, "x0": x0, "y0": y0, "x1": x1, "y1": y1, **before, **more})
    return found


def _sampled(model: list[Any], positive: list[Any]) -> Graph:
    return {
        "empty": ("CLIPTextEncode", {"text": "", "clip": ["checkpoint", 1]}),
        "latent": ("EmptyLatentImage", {"width": 512, "height": 512, "batch_size": 1}),
        "sampler": ("KSampler", {
            "seed": 1, "steps": 25, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
            "model": model, "positive": positive, "negative": ["empty", 0], "latent_image": ["latent", 0],
        }),
        "picture": ("VAEDecode", {"samples": ["sampler", 0], "vae": ["checkpoint", 2]}),
    }  # fmt: skip


CHECKPOINT: Graph = {"checkpoint": ("CheckpointLoaderSimple", {"ckpt_name": "v1-5-pruned-emaonly-fp16.safetensors"})}
WORDS: Graph = {"prompt": ("AttnCtrlPromptWords", {"clip": ["checkpoint", 1], "prompt": PROMPT})}

EXAMPLES: dict[str, Graph] = {
    "layout-native": {
        **CHECKPOINT,
        **WORDS,
        **_regions(),
        "masked": ("AttnCtrlRegionMask", {"model": ["checkpoint", 0], "regions": ["r2", 0], "words": ["prompt", 1]}),
        "guided": ("AttnCtrlSoftPAG", {"model": ["masked", 0]}),
        "recorded": ("AttnCtrlRecordMaps", {
            "model": ["guided", 0], "words": ["prompt", 1], "phrases": "a red circle\na blue square",
        }),
        **_sampled(["recorded", 0], ["prompt", 0]),
        "heat": ("AttnCtrlHeatMaps", {"maps": ["recorded", 1], "image": ["picture", 0]}),
        "show": ("PreviewImage", {"images": ["picture", 0]}),
        "show maps": ("PreviewImage", {"images": ["heat", 0]}),
    },
    "region-prompts-native": {
        **CHECKPOINT,
        **WORDS,
        **_regions(),
        "couple": ("AttnCtrlRegionPrompts", {"model": ["checkpoint", 0], "regions": ["r2", 0], "words": ["prompt", 1]}),
        **_sampled(["couple", 0], ["prompt", 0]),
        "show": ("PreviewImage", {"images": ["picture", 0]}),
    },
    "layout-pipeline": {
        "pipeline": ("AttnCtrlLoadPipeline", {"model": "shapes-sd"}),
        **_regions(),
        "method": ("AttnCtrlMethodLoCo", {}),
        "draw": ("AttnCtrlDraw", {
            "pipeline": ["pipeline", 0], "prompt": PROMPT, "methods": ["method", 0], "regions": ["r2", 0], "seed": 1,
        }),
        "show": ("PreviewImage", {"images": ["draw", 0]}),
        "show maps": ("PreviewImage", {"images": ["draw", 1]}),
    },
}  # fmt: skip


def _port(text: str) -> Port:
    name, _, kind = text.partition(":")
    return Port(name, kind)


def _core(id: str, inputs: str, outputs: str) -> Node:
    takes, gives = (tuple(_port(one) for one in some.split()) for some in (inputs, outputs))
    return Node(id, id, "", "", takes, gives, run=lambda: ())


CORE = (
    _core("CheckpointLoaderSimple", "ckpt_name:COMBO", "MODEL:MODEL CLIP:CLIP VAE:VAE"),
    _core("CLIPTextEncode", "text:STRING clip:CLIP", "CONDITIONING:CONDITIONING"),
    _core("EmptyLatentImage", "width:INT height:INT batch_size:INT", "LATENT:LATENT"),
    _core(
        "KSampler",
        "model:MODEL seed:INT control_after_generate:COMBO steps:INT cfg:FLOAT sampler_name:COMBO scheduler:COMBO "
        "positive:CONDITIONING negative:CONDITIONING latent_image:LATENT denoise:FLOAT",
        "LATENT:LATENT",
    ),
    _core("VAEDecode", "samples:LATENT vae:VAE", "IMAGE:IMAGE"),
    _core("PreviewImage", "images:IMAGE", ""),
)
"""The ports of the core nodes that examples use, widgets in the page's order."""
KNOWN = {node.id: node for node in (*NODES, *CORE)}
ONLY_PAGE = {"control_after_generate": "fixed"}
"""Widgets that the page adds, and prompts do not have."""


def as_prompt(graph: Graph) -> dict[str, dict[str, Any]]:
    """What POST /prompt takes. Widgets that a graph leaves out have their defaults."""
    numbers = {name: str(i) for i, name in enumerate(graph, 1)}
    made = {}
    for name, (id, given) in graph.items():
        defaults = {p.name: p.default for p in KNOWN[id].inputs if p.widget and p.default is not None}
        inputs = {k: [numbers[v[0]], v[1]] if isinstance(v, list) else v for k, v in {**defaults, **given}.items()}
        made[numbers[name]] = {"class_type": id, "inputs": inputs}
    return made


def as_workflow(graph: Graph) -> dict[str, Any]:
    """What ComfyUI's page opens: nodes with places, ports and widget values, and the links between them."""
    numbers = {name: i for i, name in enumerate(graph, 1)}
    links: list[list[Any]] = []
    nodes = []
    columns: dict[str, int] = {}
    for name, (id, given) in graph.items():
        node = KNOWN[id]
        column = max((columns[v[0]] + 1 for v in given.values() if isinstance(v, list)), default=0)
        columns[name] = column
        row = sum(c == column for c in columns.values()) - 1
        inputs: list[dict[str, Any]] = []
        for port in (p for p in node.inputs if not p.widget):
            link = None
            if port.name in given:
                source, slot = given[port.name]
                link = len(links) + 1
                links.append([link, numbers[source], slot, numbers[name], len(inputs), port.kind])
            inputs.append({"name": port.name, "type": port.kind, "link": link})
        nodes.append({
            "id": numbers[name],
            "type": id,
            "pos": [60 + 400 * column, 60 + 460 * row],
            "size": [340, 120 + 26 * len(node.inputs)],
            "flags": {},
            "order": numbers[name] - 1,
            "mode": 0,
            "inputs": inputs,
            "outputs": [{"name": p.name, "type": p.kind, "links": []} for p in node.outputs],
            "properties": {"Node name for S&R": id},
            "widgets_values": [given.get(p.name, ONLY_PAGE.get(p.name, p.default)) for p in node.inputs if p.widget],
        })  # fmt: skip
    for link, source, slot, *_ in links:
        nodes[source - 1]["outputs"][slot]["links"].append(link)
    return {
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": nodes,
        "links": links,
        "groups": [],
        "config": {},
        "extra": {},
        "version": 0.4,
    }
