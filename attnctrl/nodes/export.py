"""The node pack as a folder for ComfyUI's custom_nodes."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

from attnctrl.errors import ControlError
from attnctrl.nodes.catalog import NODES
from attnctrl.nodes.examples import EXAMPLES, as_workflow

MANIFEST = ".attnctrl-pack.json"
"""In the pack: the digest of each file as it was written, so that a later export knows what is its own."""
PACK = Path(__file__).parent / "pack"

ENTRY = '''"""attnctrl's nodes for ComfyUI, written by `attnctrl export-comfy`."""

from .extension import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
'''


def pack_files() -> dict[str, bytes]:
    """What the pack holds, by path."""
    texts = {
        "__init__.py": ENTRY,
        "pyproject.toml": _project(),
        "README.md": _readme(),
        **{f"example_workflows/{n}.json": json.dumps(as_workflow(g), indent=1) + "\n" for n, g in EXAMPLES.items()},
    }
    copied = {path.name: path.read_bytes() for path in PACK.iterdir() if path.suffix in (".py", ".svg")}
    return {name: text.encode() for name, text in texts.items()} | copied


def export(folder: Path) -> list[Path]:
    """Write the pack into a folder, which is new, empty, or a pack that was written here and not changed since.

    Returns what was written. Raises ControlError, and writes nothing, where a file is not one of the pack's or was
    changed.
    """
    if folder.exists() and not folder.is_dir():
        raise ControlError(f"{folder} is a file: name a folder.")
    files, known = pack_files(), _written(folder)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()) if folder.exists() else ():
        name = path.relative_to(folder).as_posix()
        if name == MANIFEST or "__pycache__" in path.parts:
            continue
        if known.get(name) != _digest(path.read_bytes()):
            what = "was changed since it was exported" if name in known else "is not part of the pack"
            raise ControlError(f"{path} {what}: move it away, or export into another folder.")
    for name in set(known) - set(files):
        (folder / name).unlink(missing_ok=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    digests = {name: _digest(content) for name, content in files.items()}
    (folder / MANIFEST).write_text(json.dumps(digests, indent=1) + "\n")
    return [folder / name for name in files]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _written(folder: Path) -> dict[str, str]:
    """What an earlier export wrote; names that would lead out of the folder do not count."""
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError:
        raise ControlError(f"{path} is no list of what was exported: move it away.") from None
    inside = folder.resolve()
    return {n: d for n, d in found.items() if (folder / n).resolve().is_relative_to(inside)}


def _project() -> str:
    return f"""[project]
name = "attnctrl"
description = "Attention control for diffusion models: layout, fidelity, editing, subjects, sparse attention."
version = "{_semantic(version("attnctrl"))}"
license = {{ text = "Apache-2.0" }}
dependencies = ["attnctrl"]

[project.urls]
# The publisher's.
Repository = ""

[tool.comfy]
# The publisher's account, and where icon.svg of this folder is served.
PublisherId = ""
DisplayName = "attnctrl"
Icon = ""
requires-comfyui = ">=0.3.64"
"""


def _semantic(found: str) -> str:
    """The first three numbers of a version, which is all that the registry of nodes takes."""
    return ".".join([*found.split("+")[0].split("."), "0", "0"][:3])


def _readme() -> str:
    rows = "\n".join(f"| {n.title} | {n.category} | {n.about} |" for n in NODES if "/methods/" not in n.category)
    methods = sum("/methods/" in n.category for n in NODES)
    return f"""# attnctrl for ComfyUI

Put this folder into `custom_nodes` and install attnctrl into ComfyUI's environment: `pip install attnctrl`.

Native nodes take and return MODEL and compose with each other and with core nodes. They work in the UNets of Stable
Diffusion 1.x, 2.x and XL, in FLUX.1 and in Wan 2.1; where a model or a layer is not covered they leave it as it is and
say why in the log. Pipeline nodes run diffusers pipelines of their own, which ComfyUI's memory management does not see.

| node | category | what it does |
|---|---|---|
{rows}

Besides these, `attnctrl/methods` has a node for each of the {methods} registered methods.

`example_workflows` opens in ComfyUI's page. The pipeline example runs on a model that ships with attnctrl.
"""
