"""Every registered method has its nodes and its documentation row; the pack is what ComfyUI can load."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tomllib
import torch

from attnctrl import cli
from attnctrl.commands.methods import page
from attnctrl.controls import REGISTRY
from attnctrl.errors import ControlError
from attnctrl.fields import entries, parameters
from attnctrl.nodes import native, pipeline
from attnctrl.nodes.catalog import NODES, nodes_of
from attnctrl.nodes.examples import EXAMPLES, KNOWN, as_prompt, as_workflow
from attnctrl.nodes.export import MANIFEST, export
from attnctrl.nodes.forms import read

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", list(REGISTRY))
def test_every_method_has_its_nodes_and_its_row(name: str) -> None:
    of = REGISTRY[name]
    nodes = nodes_of(name)
    assert len(nodes) == 1 + (name in native.NATIVE)
    for node in nodes:
        ports = {p.name: p for p in node.inputs}
        for entry in entries(of):
            port = ports[entry.name]
            assert port.widget
            if entry.low is not None:
                assert port.low == entry.low
            if entry.high is not None:
                assert port.high == entry.high
        given = {e.name: ports[e.name].default for e in entries(of)}
        # What a node shows at first is the method at its defaults.
        assert parameters(name, read(of, given)) == {}
    assert re.search(rf"^\| {name} \|.*\| {', '.join(n.id for n in nodes)} \|$", page(), flags=re.MULTILINE)


def test_the_page_of_methods_is_the_registry() -> None:
    assert (ROOT / "docs" / "methods.md").read_text() == page(), (
        "write it anew: attnctrl methods --page > docs/methods.md"
    )


def test_methods_go_where_their_task_is_done(capsys: Any) -> None:
    for of in REGISTRY.values():
        chosen = ((of.name, {}),)
        if of.task in pipeline.DRAWS:
            assert pipeline.chosen(chosen, pipeline.DRAWS, "Draw") == {of.name: {}}
        else:
            with pytest.raises(ControlError, match=f"{of.name} is for {of.task}, and Draw takes methods for layout"):
                pipeline.chosen(chosen, pipeline.DRAWS, "Draw")
    with pytest.raises(ControlError, match="loco is connected twice"):
        pipeline.chosen((("loco", {}), ("loco", {})), pipeline.DRAWS, "Draw")


def test_ids_and_names_are_unique() -> None:
    assert len({n.id for n in NODES}) == len(NODES)
    for node in NODES:
        names = [*(p.name for p in node.inputs), *(f"{p.name}_out" for p in node.outputs)]
        assert len(set(names)) == len(names), node.id


def test_attnctrl_itself_imports_nothing_of_comfyui() -> None:
    for path in (ROOT / "attnctrl").rglob("*.py"):
        if "pack" not in path.parts:
            assert not re.search(r"^\s*(import|from) comfy", path.read_text(), flags=re.MULTILINE), path


# the pack -------------------------------------------------------------------------------------------------------------
def fake_comfyui(folder: Path) -> dict[str, ModuleType]:
    """The modules that the pack imports, as far as it uses them."""

    def recorded(kind: str) -> Any:
        def make(name: str, **more: Any) -> SimpleNamespace:
            return SimpleNamespace(id=name, kind=kind, **more)

        return SimpleNamespace(Input=make, Output=make)

    names = {"Float": "FLOAT", "Int": "INT", "Boolean": "BOOLEAN", "Combo": "COMBO", "String": "STRING"}
    io = SimpleNamespace(
        Schema=lambda **given: SimpleNamespace(**given),
        NodeOutput=lambda *args: SimpleNamespace(args=args),
        ComfyNode=type("ComfyNode", (), {}),
        Custom=recorded,
        **{name: recorded(kind) for name, kind in names.items()},
    )
    contents: dict[str, dict[str, Any]] = {
        "comfy": {},
        "comfy.model_management": {"throw_exception_if_processing_interrupted": lambda: None},
        "comfy.samplers": {"calc_cond_batch": lambda *args: None},
        "comfy.utils": {"ProgressBar": lambda total: SimpleNamespace(update_absolute=lambda done, of: None)},
        "folder_paths": {"get_input_directory": lambda: str(folder)},
        "comfy_api": {},
        "comfy_api.latest": {"ComfyExtension": type("ComfyExtension", (), {}), "io": io},
    }
    found = {}
    for name, content in contents.items():
        found[name] = ModuleType(name)
        found[name].__dict__.update(content)
        if "." in name:
            parent, _, child = name.rpartition(".")
            setattr(found[parent], child, found[name])
    return found


@pytest.fixture
def classes(tmp_path: Path, monkeypatch: Any) -> dict[str, Any]:
    """The node classes of an exported pack, by their ids."""
    export(tmp_path / "pack")
    for name, module in fake_comfyui(tmp_path).items():
        monkeypatch.setitem(sys.modules, name, module)
    entry = tmp_path / "pack" / "__init__.py"
    spec = importlib.util.spec_from_file_location("pack", entry, submodule_search_locations=[str(entry.parent)])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "pack", module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "pack.extension", sys.modules["pack.extension"])
    found = asyncio.run(asyncio.run(module.comfy_entrypoint()).get_node_list())
    return {one.define_schema().node_id: one for one in found}


def test_the_pack_has_every_node_in_the_schema(classes: dict[str, Any], tmp_path: Path) -> None:
    assert set(classes) == {n.id for n in NODES}
    schema = classes["AttnCtrlRegionMask"].define_schema()
    ports = {p.id: p for p in schema.inputs}
    assert ports["model"].kind == "MODEL"
    assert (ports["weight"].default, ports["weight"].min, ports["weight"].max) == (1.0, 0, 1)
    assert [o.kind for o in schema.outputs] == ["MODEL"]
    made = classes["AttnCtrlRegion"].execute(phrase="red", weight=1.0, prompt="", x0=0.0, y0=0.0, x1=0.5, y1=1.0)
    (places,) = made.args
    assert places[0].box == (0.0, 0.0, 0.5, 1.0)
    (tmp_path / "plan.json").write_text("{}")
    (methods,) = (
        classes["AttnCtrlMethodPlanned"]
        .execute(plan="plan.json", fall_back=True, window_start=0.0, window_end=0.5)
        .args
    )
    assert methods[0][1]["plan"] == str(tmp_path / "plan.json")
    with pytest.raises(ControlError, match=r'there is no file "\.\./secret\.json" for plan'):
        classes["AttnCtrlMethodPlanned"].execute(plan="../secret.json")


def test_export_refuses_what_it_did_not_write(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "custom_nodes" / "attnctrl"
    assert cli.main(["export-comfy", str(folder)]) == 0
    assert "files in" in capsys.readouterr().out
    assert cli.main(["export-comfy", str(folder)]) == 0  # once more over its own files
    readme = (folder / "README.md").read_text()
    (folder / "README.md").write_text("mine")
    assert cli.main(["export-comfy", str(folder)]) == 2
    assert "was changed since it was exported" in capsys.readouterr().err
    assert (folder / "README.md").read_text() == "mine"
    (folder / "README.md").write_text(readme)
    (folder / "notes.txt").write_text("mine")
    assert cli.main(["export-comfy", str(folder)]) == 2
    assert "is not part of the pack" in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    (other / "__init__.py").write_text("mine")
    with pytest.raises(ControlError, match="is not part of the pack"):
        export(other)
    assert [p.name for p in other.iterdir()] == ["__init__.py"]
    with pytest.raises(ControlError, match="is a file"):
        export(other / "__init__.py")


def test_the_folder_is_ready_for_the_registry(tmp_path: Path) -> None:
    export(tmp_path)
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text())
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["project"]["version"])
    assert {"PublisherId", "DisplayName", "Icon"} <= set(project["tool"]["comfy"])
    assert (tmp_path / "icon.svg").read_text().startswith("<svg")
    assert set(json.loads((tmp_path / MANIFEST).read_text())) == {
        p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file() and p.name != MANIFEST
    }


@pytest.mark.parametrize("name", list(EXAMPLES))
def test_examples_connect_what_fits(name: str) -> None:
    graph = EXAMPLES[name]
    workflow, prompt = as_workflow(graph), as_prompt(graph)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for link, source, slot, target, port, kind in workflow["links"]:
        assert nodes[source]["outputs"][slot]["type"] == nodes[target]["inputs"][port]["type"] == kind
        assert nodes[target]["inputs"][port]["link"] == link
        assert link in nodes[source]["outputs"][slot]["links"]
    for number, node in prompt.items():
        ports = {p.name: p for p in KNOWN[node["class_type"]].inputs}
        assert set(node["inputs"]) <= set(ports)
        missing = [p.name for p in ports.values() if not (p.optional or p.name in node["inputs"])]
        assert not [m for m in missing if m != "control_after_generate"], node
        widgets = [p for p in ports.values() if p.widget]
        assert len(nodes[int(number)]["widgets_values"]) == len(widgets)


def test_masks_and_boxes_become_regions() -> None:
    mask = torch.zeros(1, 8, 8)
    mask[:, :4] = 1
    from attnctrl.nodes.places import region

    (places,) = region("red", mask=mask)
    (places,) = region("blue", x0=0.5, regions=places)
    assert [p.box for p in places] == [None, (0.5, 0.0, 1.0, 1.0)]
    assert float(places[0].region().raster(8, 8).sum()) == 32
    with pytest.raises(ControlError, match="empty or reversed"):
        region("red", x0=0.6, x1=0.4)
    with pytest.raises(ControlError, match="all zero"):
        region("red", mask=torch.zeros(1, 8, 8))
