"""Every editing method on the FLUX-class shapes model: it runs and changes the picture, or refuses with a sentence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attnctrl as ac
from attnctrl import shapes
from attnctrl.bench.edit_tasks import EditTask, make_edits, object_mask
from attnctrl.controls import REGISTRY
from attnctrl.pipelines import EditPipeline

JOINT = ("inpaint-fusion", "mutual-self-attention", "design-edit")
"""The methods whose mechanism has a meaning in joint attention, or needs none."""
REFUSED = {
    "prompt-to-prompt": "passes cross-attention on, and this model has joint attention",
    "ale-edit": "selects none of the 8 attention sites",
    "multi-mask-inpaint": "selects none of the 8 attention sites",
    "focus-on-instruction": "has nothing to do in this edit",
    "lime": "selects no attention layer of this model, which has joint",
    "plug-and-play": "features of a UNet's decoder, and this model has none",
    "prime-composer": 'needs trajectories of pictures, which inversion "(virtual|rf)" does not make',
}


@pytest.fixture(scope="module")
def pipe() -> Any:
    loaded = shapes.load("dit")
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def task() -> EditTask:
    return make_edits("two", 1)[0]


def edited(pipe: Any, task: EditTask, name: str, inversion: str) -> np.ndarray:
    """The picture after 3 steps, with what the method is about."""
    method: Any = name
    about: dict[str, Any] = {"edits": task.edits}
    thing = object_mask(task.layout, 0)
    if name == "design-edit":
        about = {"layers": [ac.Layer(thing, dx=0.1)]}
    if name == "prime-composer":
        method = ac.PrimeComposer(task.picture, thing, box=(0.1, 0.1, 0.4, 0.4), phrase=task.edits[0].target)
    options: dict[str, Any] = {"num_inference_steps": 3, "guidance": 2.0, "record": False}
    result = EditPipeline(pipe)(
        task.picture, task.layout.prompt, method=method, inversion=inversion, **about, **options
    )
    return np.asarray(result.images[0], dtype=np.float64)


def test_every_method_is_told_of() -> None:
    assert {*JOINT, *REFUSED} == {m.name for m in REGISTRY.values() if m.task == "editing"}


@pytest.mark.parametrize("inversion", ["virtual", "rf"])
@pytest.mark.parametrize("name", ["none", *JOINT])
def test_methods_that_run(pipe: Any, task: EditTask, name: str, inversion: str) -> None:
    found = edited(pipe, task, name, inversion)
    changed = np.abs(found - np.asarray(task.picture, dtype=np.float64)).max(axis=-1) > 8
    assert changed.any()
    if name == "mutual-self-attention":
        assert np.abs(found - edited(pipe, task, "none", inversion)).max() > 8


@pytest.mark.parametrize("inversion", ["virtual", "rf"])
@pytest.mark.parametrize("name", REFUSED)
def test_methods_that_refuse(pipe: Any, task: EditTask, name: str, inversion: str) -> None:
    with pytest.raises(ac.ControlError, match=REFUSED[name]):
        edited(pipe, task, name, inversion)
