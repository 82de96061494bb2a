"""Every node of the pack."""

from __future__ import annotations

from attnctrl.nodes import native, pipeline, readouts, tasks
from attnctrl.nodes.forms import Node

NODES: tuple[Node, ...] = (*native.NODES, *pipeline.NODES, *tasks.NODES, *readouts.NODES)


def nodes_of(method: str) -> list[Node]:
    """The nodes that offer a registered method."""
    return [node for node in NODES if node.method == method]
