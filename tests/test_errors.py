"""Bad input: one sentence with the fact in it, and a pipeline that is as it was."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import attnctrl as ac
from attnctrl.controls import REGISTRY
from tests import tiny
from tests.methods import CLASSIC, busy
from tests.probes import REGIONS
from tests.spies import assert_restored, snapshot

LEFT = (0.0, 0.0, 0.5, 1.0)
LONG = "a " * 22 + "cat"
TWO = ["a cat", "a dog"]


def mask(values: Any) -> Callable[[], ac.Control]:
    return lambda: ac.RegionMask((ac.Region("cat", mask=values),))


def box(*values: float) -> Callable[[], ac.Control]:
    return lambda: ac.RegionMask((ac.Region("cat", box=values),))


def regions(*made: ac.Region) -> Callable[[], ac.Control]:
    return lambda: ac.RegionMask(made)


# name: (what makes the control, the prompt, the sentence)
CASES: dict[str, tuple[Callable[[], ac.Control], Any, str]] = {
    "phrase not in the prompt": (
        regions(ac.Region("a zebra", box=LEFT)),
        tiny.PROMPT,
        r'"a zebra" is not in the prompt "a cat and a dog".*1:a, 2:cat, 3:and, 4:a, 5:dog\.$',
    ),
    "phrase longer than the window": (
        regions(ac.Region(LONG, box=LEFT)),
        LONG,
        r"ends at token 23, beyond the text encoder's window of 24 tokens",
    ),
    "phrase behind the window": (regions(ac.Region("cat", box=LEFT)), LONG, r'"cat" ends at token 23, beyond'),
    "occurrence": (regions(ac.Region("cat", box=LEFT, occurrence=1)), tiny.PROMPT, r'occurrence 1 of "cat"'),
    "phrases of a loss": (lambda: ac.AStar(("cat", "zebra")), tiny.PROMPT, r'"zebra" is not in the prompt'),
    "phrases as one string": (lambda: ac.AttendExcite("cat"), tiny.PROMPT, r'phrases is one string \("cat"\)'),
    "mixed phrases": (lambda: ac.AttendExcite(("cat", ("dog",))), tiny.PROMPT, r"mix single phrases and lists"),
    "box outside": (
        box(0.5, 0.0, 1.5, 1.0),
        tiny.PROMPT,
        r'"cat": box \(0\.5, 0\.0, 1\.5, 1\.0\) reaches outside 0\.\.1',
    ),
    "box reversed": (box(0.5, 0.0, 0.2, 1.0), tiny.PROMPT, r'"cat": box .* is empty or reversed'),
    "box with nan": (box(0.5, 0.0, float("nan"), 1.0), tiny.PROMPT, r"four finite numbers"),
    "box empty at the coarsest grid": (
        # Between the centres of the 8 x 8 grid, around one of the 16 x 16 grid.
        box(0.02, 0.02, 0.05, 0.05),
        tiny.PROMPT,
        r'"cat" is empty after rasterising to 8x8 tokens: make it larger',
    ),
    "mask of the wrong size": (
        mask(np.ones((64, 32))),
        tiny.PROMPT,
        r'"cat": the mask is 32x64 pixels, which is not the picture\'s aspect ratio',
    ),
    "mask all zero": (mask(np.zeros((16, 16))), tiny.PROMPT, r'"cat": the mask is all zero'),
    "mask with nan": (mask(np.full((16, 16), np.nan)), tiny.PROMPT, r'"cat": the mask holds NaN'),
    "mask with three channels": (mask(np.ones((16, 16, 3))), tiny.PROMPT, r"mask has shape \(16, 16, 3\)"),
    "unknown method": (lambda: _method("magic"), tiny.PROMPT, r'method "magic" is unknown: choose one of region-mask'),
    "unknown parameter": (
        lambda: REGISTRY["loco"].make(REGIONS, gamma=3),
        tiny.PROMPT,
        r'method "loco" has no parameter "gamma": it has scale',
    ),
    "parameter out of range": (lambda: ac.LoCo(REGIONS, beta=1.5), tiny.PROMPT, r"LoCo: beta is 1\.5: .*\[0, 1\]"),
    "unknown choice": (
        lambda: ac.DenseDiffusion(REGIONS, free_tokens="drop"),
        tiny.PROMPT,
        r"DenseDiffusion: free_tokens is 'drop': choose one of keep, push",
    ),
    "window": (
        lambda: ac.LoCo(REGIONS, window=ac.Window(0.5, 0.2)),
        tiny.PROMPT,
        r"Window\(0\.5, 0\.2\) is not a part",
    ),
    "fewer lists of regions than prompts": (
        lambda: ac.RegionMask((REGIONS[:1],)),
        TWO,
        r"1 lists of regions for 2 prompts",
    ),
    "more lists of regions than prompts": (
        lambda: ac.RegionMask((REGIONS[:1], REGIONS[:1], ())),
        TWO,
        r"3 lists of regions for 2 prompts",
    ),
    "regions and lists of regions": (
        lambda: ac.RegionMask((REGIONS[0], REGIONS[1:])),
        TWO,
        r"mix single regions and lists",
    ),
    "regions of the wrong prompt": (
        lambda: ac.RegionMask((REGIONS[1:], REGIONS[:1])),
        TWO,
        r'"dog" is not in the prompt "a cat"',
    ),
    "lists of phrases": (lambda: ac.AStar((("cat",), ("dog",), ("cat",))), TWO, r"3 lists of phrases for 2 prompts"),
    "one list of regions for unlike prompts": (
        lambda: ac.RegionMask(REGIONS),
        TWO,
        r'"dog" is not in the prompt "a cat"',
    ),
}


def _method(name: str) -> Any:
    from attnctrl.controls import method

    return method(name).make(REGIONS)


@pytest.mark.parametrize("case", CASES)
def test_bad_input_has_one_sentence_and_no_consequence(case: str) -> None:
    make, prompt, sentence = CASES[case]
    pipe = tiny.sd()
    expected, before = tiny.draw(pipe, prompt, 2), snapshot(pipe)
    with pytest.raises(ac.ControlError, match=sentence) as caught, ac.control(pipe, make()):
        tiny.draw(pipe, prompt, 2)
    assert len(str(caught.value).splitlines()) == 1
    assert_restored(before, pipe)
    assert torch.equal(tiny.draw(pipe, prompt, 2), expected)
    with ac.control(pipe, record=["a"]):  # and it can be controlled
        assert torch.equal(tiny.draw(pipe, prompt, 2), expected)


@pytest.mark.parametrize("name", CLASSIC)
def test_every_method_checks_its_input_before_the_first_step(name: str) -> None:
    """The number of prompts is wrong: no step is run and nothing is left behind."""
    pipe = tiny.sd()
    before, steps = snapshot(pipe), []

    def callback(pipe: Any, index: int, timestep: Any, values: dict) -> dict:
        steps.append(index)
        return values

    one = busy(name)
    single = tuple(getattr(one, "regions", ())) or tuple(getattr(one, "phrases", ()))
    lists = type(one)((single, single, single), window=one.window)
    with pytest.raises(ac.ControlError, match=r"3 lists of (regions|phrases) for 1 prompts"), ac.control(pipe, lists):
        tiny.draw(pipe, callback_on_step_end=callback)
    assert steps == []
    assert_restored(before, pipe)


class Transformer:
    """Stands for a model of a family that is not supported."""


UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "a transformer": (SimpleNamespace(transformer=Transformer()), r"SimpleNamespace with Transformer is not supported"),
    "another unet": (SimpleNamespace(unet=torch.nn.Linear(2, 2)), r"with Linear is not supported yet"),
    "no model": (SimpleNamespace(), r"with NoneType is not supported"),
    "a model": (torch.nn.Linear(2, 2), r"Linear with NoneType is not supported"),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_pipelines_of_other_families(kind: str) -> None:
    pipe, sentence = UNSUPPORTED[kind]
    with (
        pytest.raises(ac.ControlError, match=rf"{sentence}.*supported are Stable Diffusion"),
        ac.control(pipe, ac.RegionMask(REGIONS)),
    ):
        pytest.fail("the block was entered")


def test_a_real_transformer_pipeline_of_another_family() -> None:
    from diffusers import DiTPipeline, DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1, sample_size=8
    )
    pipe = DiTPipeline(model, tiny.vae(), tiny.SCHEDULERS["ddim"]())
    with (
        pytest.raises(ac.ControlError, match=r"DiTPipeline with DiTTransformer2DModel is not supported yet"),
        ac.control(pipe),
    ):
        pytest.fail("the block was entered")


def test_a_batch_that_is_not_understood() -> None:
    """A pipeline with three branches of guidance, say: its rows are not taken for something else."""
    pipe = tiny.sd()
    with ac.control(pipe, ac.RegionMask(REGIONS)):
        pipe.encode_prompt("a cat and a dog", "cpu", 1, True)
        with pytest.raises(ac.ControlError, match=r"batch of 3 for 1 pictures"):
            pipe.unet(torch.zeros(3, 4, 16, 16), 1, encoder_hidden_states=torch.zeros(3, 24, 16))


def test_control_errors_are_value_errors() -> None:
    assert issubclass(ac.ControlError, ValueError)
