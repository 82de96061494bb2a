"""The nodes of attnctrl in ComfyUI's V3 schema. They are described in attnctrl.nodes; here they meet ComfyUI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.samplers
import comfy.utils
import folder_paths
from comfy_api.latest import ComfyExtension, io

from attnctrl.nodes.catalog import NODES
from attnctrl.nodes.forms import Node, Port


def ticker() -> Any:
    """A function (done, total) that moves the node's bar and ends the run when it was cancelled."""
    bars: dict[int, Any] = {}

    def tick(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bars.setdefault(total, comfy.utils.ProgressBar(total)).update_absolute(done, total)

    return tick


def input_files() -> dict[str, Path]:
    """The files of ComfyUI's input folder, by name."""
    return {path.name: path for path in Path(folder_paths.get_input_directory()).iterdir() if path.is_file()}


HOST = {"calc_cond_batch": lambda: comfy.samplers.calc_cond_batch, "tick": ticker, "files": input_files}
"""What nodes need of ComfyUI, made anew for each execution."""


def as_input(port: Port) -> Any:
    more = {"tooltip": port.help or None, "optional": port.optional}
    if port.kind == "FLOAT":
        return io.Float.Input(
            port.name, default=port.default, min=port.low, max=port.high, step=0.01, round=False, **more
        )
    if port.kind == "INT":
        return io.Int.Input(
            port.name, default=port.default, min=int(port.low or 0), max=int(port.high or 0), step=1, **more
        )
    if port.kind == "BOOLEAN":
        return io.Boolean.Input(port.name, default=port.default, **more)
    if port.kind == "COMBO":
        return io.Combo.Input(port.name, options=list(port.choices), default=port.default, **more)
    if port.kind == "STRING":
        return io.String.Input(port.name, default=port.default, multiline=port.lines, **more)
    return io.Custom(port.kind).Input(port.name, **more)


def as_output(port: Port) -> Any:
    return io.Custom(port.kind).Output(f"{port.name}_out", display_name=port.name, tooltip=port.help or None)


def as_class(node: Node) -> type[io.ComfyNode]:
    def define_schema(cls: Any) -> io.Schema:
        return io.Schema(
            node_id=node.id,
            display_name=node.title,
            category=node.category,
            description=node.about,
            inputs=[as_input(port) for port in node.inputs],
            outputs=[as_output(port) for port in node.outputs],
        )

    def execute(cls: Any, /, **inputs: Any) -> io.NodeOutput:
        return io.NodeOutput(*node.run(**inputs, **{name: HOST[name]() for name in node.needs}))

    return type(
        node.id, (io.ComfyNode,), {"define_schema": classmethod(define_schema), "execute": classmethod(execute)}
    )


class AttnCtrlExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [as_class(node) for node in NODES]


async def comfy_entrypoint() -> AttnCtrlExtension:
    return AttnCtrlExtension()
