"""Pipeline nodes on the shipped model, under the inference mode in which ComfyUI runs nodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from attnctrl import Region
from attnctrl.errors import ControlError
from attnctrl.nodes import pipeline, readouts, tasks
from attnctrl.nodes.catalog import NODES
from attnctrl.nodes.places import region
from attnctrl.pipelines import LayoutPipeline

PROMPT = "a red circle and a blue square on a white background"


def run(id: str, **given: Any) -> Any:
    """A node with the defaults of its ports, as the host executes it."""
    node = next(n for n in NODES if n.id == id)
    ticks: list[tuple[int, int]] = []
    host = {"tick": lambda done, total: ticks.append((done, total)), "files": {}}
    with torch.inference_mode():
        found = node.run(
            **{p.name: p.default for p in node.inputs if p.widget} | given, **{n: host[n] for n in node.needs}
        )
    assert len(found) == len(node.outputs)
    if "tick" in node.needs:
        assert ticks[-1][0] == ticks[-1][1]
    return found


@pytest.fixture(scope="module")
def pipe() -> Any:
    return run("AttnCtrlLoadPipeline", device="cpu")[0]


def test_draw_descends_a_loss_and_draws_what_the_pipeline_draws(pipe: Any) -> None:
    (methods,) = run("AttnCtrlMethodLoCo", window_end=1.0)
    (places,) = region("a red circle", x0=0.05, y0=0.1, x1=0.45, y1=0.6)
    images, maps, report = run(
        "AttnCtrlDraw", pipeline=pipe, prompt=PROMPT, steps=2, seed=3, methods=methods, regions=places
    )
    assert images.shape == (1, 128, 128, 3)
    assert images.dtype == torch.float32
    assert not images.is_inference()
    assert maps.shape[-1] == 3
    assert "LoCo" in report
    alone = LayoutPipeline(pipe)(
        PROMPT, [Region("a red circle", box=(0.05, 0.1, 0.45, 0.6))], method={"loco": dict(methods[0][1])},
        num_inference_steps=2, guidance=3.5, generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    assert (np.asarray(alone.images[0]) == (images[0].numpy() * 255).round().astype(np.uint8)).all()


def test_an_edit_keeps_what_lies_outside_its_region(pipe: Any) -> None:
    picture = torch.rand(1, 64, 72, 3, generator=torch.Generator().manual_seed(0))
    (methods,) = run("AttnCtrlMethodPromptToPrompt")
    (places,) = region("red circle", x1=0.5)
    images, drawn, report = run(
        "AttnCtrlEdit", pipeline=pipe, image=picture, source_prompt="a red circle and a blue square",
        edits="red circle = green star", steps=2, feather=0, methods=methods, regions=places,
    )  # fmt: skip
    assert images.shape == drawn.shape == picture.shape
    given = (picture * 255).round() / 255
    assert torch.allclose(images[:, :, 36:], given[:, :, 36:], atol=1e-6)
    assert not torch.allclose(images[:, :, :36], given[:, :, :36], atol=1e-2)
    assert "PromptToPrompt" in report


def test_subjects_and_segments(pipe: Any) -> None:
    picture = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 64, 64)
    mask[:, 16:48, 16:48] = 1
    (subjects,) = tasks.subject("a red circle", picture, 1.0, mask)
    (methods,) = run("AttnCtrlMethodMagicFace")
    images, report = run(
        "AttnCtrlDrawSubjects", pipeline=pipe, prompt=PROMPT, subjects=subjects, steps=2, methods=methods
    )
    assert images.shape == (1, 128, 128, 3)
    assert "MagicFace" in report
    (found,) = run(
        "AttnCtrlSegment", pipeline=pipe, image=images, prompt=PROMPT, phrases="red circle\nblue square", steps=2
    )
    assert found.shape == (2, 128, 128)
    assert set(found.unique().tolist()) <= {0.0, 1.0}


def test_bad_input_has_a_sentence(pipe: Any) -> None:
    (loco,) = run("AttnCtrlMethodLoCo")
    with pytest.raises(ControlError, match="loco places objects in regions: connect at least one"):
        run("AttnCtrlDraw", pipeline=pipe, prompt=PROMPT, methods=loco)
    with pytest.raises(ControlError, match="loco is for layout, and Edit takes methods for editing"):
        run("AttnCtrlEdit", pipeline=pipe, image=torch.rand(1, 64, 64, 3), source_prompt=PROMPT, methods=loco)
    with pytest.raises(ControlError, match="write words = other words"):
        tasks.as_edits("red circle", {})
    with pytest.raises(ControlError, match='a region is for "green star", which no edit changes'):
        tasks.as_edits("red circle = blue circle", {"green star": None})
    with pytest.raises(ControlError, match=r"loco: scale is 5000: it must be in \[0, 1000\]"):
        run("AttnCtrlMethodLoCo", scale=5000)
    with pytest.raises(ControlError, match="correspond does something else: this node takes parameters of segment"):
        readouts._params((("correspond", {}),), "segment")
    with pytest.raises(ControlError, match="prime-composer pastes an object"):
        tasks._pasted(None, None, ())
    with pytest.raises(ControlError, match="a subject has at most one region"):
        tasks.subject("a", torch.rand(1, 64, 64, 3), 1.0, regions=region("b", regions=region("a")[0])[0])


def test_lines_hold_something() -> None:
    assert pipeline.lines(" a \n\n b") == ["a", "b"]
