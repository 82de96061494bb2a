"""attnctrl methods: the registry, for people."""

from __future__ import annotations

import argparse
from dataclasses import Field

from attnctrl.controls import REGISTRY, method


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="show one method with its parameters")


def main(args: argparse.Namespace) -> int:
    """List every method, or one with its parameters, ranges and defaults."""
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
