"""Calling any pipeline alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnctrl as ac
from attnctrl.models import call_arguments
from attnctrl.shapes import models
from attnctrl.shapes.pretrained import assemble
from tests import dit, tiny
from tests.parts import TOKENS
from tests.transformers import FAMILIES

LONG = {"max_sequence_length": TOKENS}


@pytest.fixture(scope="module")
def shapes() -> Any:
    pipe = assemble(dit.transformer(), models.flow_scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_guidance_is_called_what_the_pipeline_calls_it() -> None:
    sd, flux, qwen, sd3 = tiny.sd(), *(FAMILIES[name].make() for name in ("flux", "qwen", "sd3"))
    assert call_arguments(sd, "a cat", 3.5) == {"prompt": "a cat", "guidance_scale": 3.5}
    assert call_arguments(sd3, ["a cat"], 3.5) == {"prompt": ["a cat"], "guidance_scale": 3.5}
    for pipe in (flux, qwen):
        assert call_arguments(pipe, "a cat", 3.5) == {"prompt": "a cat", "true_cfg_scale": 3.5, "negative_prompt": ""}
        two = call_arguments(pipe, ["a cat", "a dog"], 3.5)
        assert two["negative_prompt"] == ["", ""]
        assert call_arguments(pipe, "a cat", 1.0) == {"prompt": "a cat", "true_cfg_scale": 1.0}
    flux.transformer.register_to_config(guidance_embeds=True)
    assert call_arguments(flux, "a cat", 3.5) == {"prompt": "a cat", "guidance_scale": 3.5}


def test_what_is_given_wins_and_nothing_unknown_passes() -> None:
    flux = FAMILIES["flux"].make()
    found = call_arguments(flux, "a cat", 3.5, {"negative_prompt": "a dog", **LONG})
    assert found == {"prompt": "a cat", "true_cfg_scale": 3.5, "negative_prompt": "a dog", **LONG}
    assert call_arguments(flux, "a cat") == {"prompt": "a cat"}
    with pytest.raises(ac.ControlError, match='a call of FluxPipeline has no "eta": it has prompt, prompt_2'):
        call_arguments(flux, "a cat", given={"eta": 1.0})


def test_a_text_encoder_is_asked_for_no_more_than_it_has(shapes: Any) -> None:
    arguments = call_arguments(shapes, ["a red circle", "a blue star"], 3.5)
    assert arguments["max_sequence_length"] == 32
    drawn = shapes(**arguments, num_inference_steps=1, output_type="latent").images
    assert drawn.shape == (2, 64, 16)
    assert call_arguments(shapes, "a red circle", given={"max_sequence_length": 16})["max_sequence_length"] == 16


def test_guidance_is_classifier_free(shapes: Any) -> None:
    """One step with guidance s is u + s (c - u) of the unguided steps with and without the prompt."""

    def draw(prompt: str, scale: float) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        arguments = call_arguments(shapes, prompt, scale)
        return shapes(**arguments, num_inference_steps=1, generator=generator, output_type="latent").images

    conditional, unconditional = draw("a red circle", 1.0), draw("", 1.0)
    expected = unconditional + 3.0 * (conditional - unconditional)
    assert not torch.allclose(conditional, unconditional, atol=1e-3)
    torch.testing.assert_close(draw("a red circle", 3.0), expected, atol=1e-4, rtol=1e-4)
