"""ComfyUI's server with the exported pack: ATTNCTRL_COMFYUI names its source tree.

Run it with the Python of ComfyUI's environment. ATTNCTRL_COMFYUI_LOG names a file for what was done and said.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest
from PIL import Image

TREE = os.environ.get("ATTNCTRL_COMFYUI")
pytestmark = pytest.mark.skipif(not TREE, reason="ATTNCTRL_COMFYUI does not name a ComfyUI tree")
PORT = 8197
URL = f"http://127.0.0.1:{PORT}"
PATIENCE = float(os.environ.get("ATTNCTRL_COMFYUI_SECONDS", "600"))


def ask(path: str, body: Any = None) -> Any:
    """The answer's bytes; of JSON, its content."""
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(URL + path, data, {"Content-Type": "application/json"}), timeout=60) as answer:
        content = answer.read()
        return json.loads(content) if "json" in answer.headers.get("Content-Type", "") else content


@pytest.fixture(scope="module")
def log() -> Iterator[list[str]]:
    lines: list[str] = []
    yield lines
    if "ATTNCTRL_COMFYUI_LOG" in os.environ:
        Path(os.environ["ATTNCTRL_COMFYUI_LOG"]).write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def server(tmp_path_factory: Any, log: list[str]) -> Iterator[None]:
    from attnctrl.nodes.export import export

    base = tmp_path_factory.mktemp("comfyui")
    for name in ("custom_nodes", "models", "input", "output", "temp", "user"):
        (base / name).mkdir()
    export(base / "custom_nodes" / "attnctrl")
    said = base / "server.log"
    command = [sys.executable, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(PORT), "--disable-api-nodes"]
    command += ["--base-directory", str(base), "--database-url", "sqlite:///:memory:"]
    with said.open("w") as out:
        process = subprocess.Popen(command, cwd=TREE, stdout=out, stderr=subprocess.STDOUT)
    try:
        start = time.monotonic()
        while time.monotonic() - start < PATIENCE:
            assert process.poll() is None, said.read_text()
            try:
                stats = ask("/system_stats")["system"]
                break
            except (URLError, OSError):
                time.sleep(1)
        log += [
            f"ComfyUI {stats['comfyui_version']}, Python {stats['python_version'].split()[0]}, "
            f"PyTorch {stats['pytorch_version']}, --cpu"
        ]
        yield
    finally:
        process.terminate()
        process.wait(60)
    kept = ("seconds: ", "IMPORT FAILED", "got prompt", "Prompt executed", "!!!")
    lines = [line for line in said.read_text().splitlines() if any(word in line for word in kept)]
    log += ["", "of the server's log:", *(line.replace(str(base), "BASE") for line in lines)]


def run(prompt: dict[str, Any]) -> dict[str, Any]:
    """The history of a prompt once it is done."""
    number = ask("/prompt", {"prompt": prompt, "client_id": "tests"})["prompt_id"]
    start = time.monotonic()
    while time.monotonic() - start < PATIENCE:
        found = ask(f"/history/{number}")
        if number in found and found[number]["status"]["status_str"]:
            history: dict[str, Any] = found[number]
            return history
        time.sleep(1)
    raise AssertionError("the prompt did not end in time")


def test_the_server_lists_every_node(server: None, log: list[str]) -> None:
    from attnctrl.nodes.catalog import NODES

    listed = ask("/object_info")
    ours = {name for name, info in listed.items() if info["python_module"].endswith("attnctrl")}
    assert ours == {n.id for n in NODES}
    log += ["", f"GET /object_info: {len(ours)} nodes of the pack among {len(listed)}"]
    info = listed["AttnCtrlRegionMask"]
    assert list(info["input"]["required"])[:3] == ["model", "regions", "words"]
    kind, options = info["input"]["required"]["weight"]
    assert (kind, options["default"], options["min"], options["max"]) == ("FLOAT", 1.0, 0, 1)
    log += [f"  AttnCtrlRegionMask, {name}: {json.dumps(port)}" for name, port in info["input"]["required"].items()]


def test_a_workflow_with_gradients_draws(server: None, log: list[str]) -> None:
    from attnctrl.nodes.examples import EXAMPLES, as_prompt

    prompt = as_prompt(EXAMPLES["layout-pipeline"])
    draw = next(number for number, node in prompt.items() if node["class_type"] == "AttnCtrlDraw")
    prompt[draw]["inputs"]["steps"] = 8
    start = time.monotonic()
    history = run(prompt)
    assert history["status"]["completed"], history["status"]
    log += ["", f"POST /prompt, layout-pipeline with 8 steps: {history['status']['status_str']}"]
    log += [f"  in {time.monotonic() - start:.0f} s"]
    shown = [image for output in history["outputs"].values() for image in output["images"]]
    assert len(shown) == 2
    for image in shown:
        content = ask(f"/view?filename={image['filename']}&subfolder={image['subfolder']}&type={image['type']}")
        picture = Image.open(io.BytesIO(content))
        assert len(picture.convert("RGB").getcolors(picture.width * picture.height) or ()) > 16
        digest = hashlib.sha256(picture.tobytes()).hexdigest()[:16]
        log += [f"  {image['filename']}: {picture.width}x{picture.height}, sha256 of the pixels {digest}..."]
        if "ATTNCTRL_COMFYUI_LOG" in os.environ:
            picture.save(Path(os.environ["ATTNCTRL_COMFYUI_LOG"]).with_name(f"comfyui-{picture.width}.png"))


def test_values_out_of_range_and_missing_regions_are_refused(server: None, log: list[str]) -> None:
    from attnctrl.nodes.examples import EXAMPLES, as_prompt

    prompt = as_prompt(EXAMPLES["layout-pipeline"])
    method = next(number for number, node in prompt.items() if node["class_type"] == "AttnCtrlMethodLoCo")
    draw = next(number for number, node in prompt.items() if node["class_type"] == "AttnCtrlDraw")
    prompt[method]["inputs"]["scale"] = -1
    with pytest.raises(HTTPError) as refused:
        ask("/prompt", {"prompt": prompt, "client_id": "tests"})
    assert refused.value.code == 400
    errors = json.loads(refused.value.read())["node_errors"][method]["errors"]
    assert errors[0]["type"] == "value_smaller_than_min"
    log += ["", f"scale -1: HTTP 400, {errors[0]['type']}: {errors[0]['details']}"]
    prompt[method]["inputs"]["scale"] = 20
    del prompt[draw]["inputs"]["regions"]
    history = run(prompt)
    failed = next(m for kind, m in history["status"]["messages"] if kind == "execution_error")
    assert "loco places objects in regions: connect at least one." in failed["exception_message"]
    log += [f"no regions: {failed['exception_type'].rpartition('.')[2]}: {failed['exception_message'].strip()}"]


@pytest.mark.parametrize("name", ["layout-native", "region-prompts-native"])
def test_native_examples_lack_nothing_but_a_checkpoint(server: None, log: list[str], name: str) -> None:
    from attnctrl.nodes.examples import EXAMPLES, as_prompt

    with pytest.raises(HTTPError) as refused:
        ask("/prompt", {"prompt": as_prompt(EXAMPLES[name]), "client_id": "tests"})
    errors = json.loads(refused.value.read())["node_errors"]
    assert {one["class_type"] for one in errors.values()} == {"CheckpointLoaderSimple"}
    log += [f"{name}: refused for its checkpoint alone, of which there is none"]
