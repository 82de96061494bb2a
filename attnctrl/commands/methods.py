"""attnctrl methods: the registry, for people."""

from __future__ import annotations

import argparse
from dataclasses import Field

from attnctrl.controls import REGISTRY, method
from attnctrl.fields import paper_link


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="show one method with its parameters")
    parser.add_argument("--page", action="store_true", help="print docs/methods.md")


def main(args: argparse.Namespace) -> int:
    """List every method, or one with its parameters, ranges and defaults."""
    if args.page:
        print(page(), end="")
        return 0
    if args.name:
        print(describe(args.name))
        return 0
    width = max(map(len, REGISTRY))
    for entry in REGISTRY.values():
        print(f"{entry.name:<{width}}  {entry.task:<9} {entry.control.fixes}  [{entry.control.paper}]")
    return 0


def describe(name: str) -> str:
    """Name, source, docstring and parameters of one method."""
    entry = method(name)
    lines = [f"{entry.name} ({entry.control.__name__}), {entry.control.paper}", ""]
    lines += [line.removeprefix("    ") for line in (entry.control.__doc__ or "").strip().splitlines()]
    lines += ["", "parameters:"]
    lines += [f"  {_signature(p)}  {p.metadata['help']}" for p in entry.params.values()]
    return "\n".join(lines)


def _signature(field: Field) -> str:
    low, high, choices = (field.metadata.get(k) for k in ("low", "high", "choices"))
    limits = f" in [{low:g}, {high:g}]" if low is not None and high is not None else ""
    return f"{field.name} = {field.default!r}{limits}{' of ' + '|'.join(map(str, choices)) if choices else ''}".ljust(
        40
    )


def page() -> str:
    """docs/methods.md: every registered method by its task, with its paper, its parameters and its ComfyUI nodes."""
    from attnctrl.nodes.catalog import nodes_of

    lines = [
        "# Methods",
        "",
        "Made from the registry by `attnctrl methods --page`; `attnctrl methods NAME` tells more.",
    ]
    for task in dict.fromkeys(one.task for one in REGISTRY.values()):
        lines += ["", f"## {task.capitalize()}", "", "| name | class | for | source | parameters | ComfyUI nodes |"]
        lines.append("|---|---|---|---|---|---|")
        for of in (one for one in REGISTRY.values() if one.task == task):
            cells = [of.name, of.control.__name__, of.control.fixes, paper_link(of), ", ".join(of.params)]
            cells.append(", ".join(node.id for node in nodes_of(of.name)))
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"
