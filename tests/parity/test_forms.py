"""Pipelines of the same transformers that begin from a picture, and calls and layers that a family must tell apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    QwenImageEditPipeline,
    QwenImageImg2ImgPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    ZImageImg2ImgPipeline,
)
from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from PIL import Image

import attnctrl as ac
from tests import tiny
from tests.chat import qwen, zimage
from tests.flux2 import flux2
from tests.parts import TOKENS
from tests.probes import Context, Guide, Inputs, Noise, Output
from tests.transformers import FAMILIES, draw, sd3

ALL = ac.Where(kinds=("self", "cross", "joint"))
PICTURE = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(3))
HALF = torch.zeros(1, 1, 16, 24)
HALF[..., :12] = 1
SHORT = {"max_sequence_length": TOKENS, "guidance_scale": 3.0}
QWEN = {"true_cfg_scale": 3.0, "negative_prompt": "a bird"}


def again(kind: type, make: Callable[[], Any]) -> Callable[[], Any]:
    """Another pipeline of the same parts."""
    return lambda: kind(**make().components)


def redraw(pipe: Any, **kwargs: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 16, "width": 24, "num_inference_steps": 4, "output_type": "latent"}
    return pipe(prompt=tiny.PROMPT, generator=torch.Generator().manual_seed(7), **size, **kwargs)[0]


FORMS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "sd3 from a picture": (
        again(StableDiffusion3Img2ImgPipeline, sd3),
        {"image": PICTURE, "strength": 0.5, **SHORT},
    ),
    "sd3 inpainting": (
        again(StableDiffusion3InpaintPipeline, lambda: sd3(16, 17)),
        {"image": PICTURE, "mask_image": HALF, "strength": 0.5, **SHORT},
    ),
    "qwen from a picture": (
        again(QwenImageImg2ImgPipeline, qwen),
        {"image": PICTURE, "strength": 0.5, **QWEN},
    ),
    "qwen edit": (lambda: qwen(QwenImageEditPipeline), {"image": Image.new("RGB", (32, 32), "red"), **QWEN}),
    "z-image from a picture": (
        again(ZImageImg2ImgPipeline, zimage),
        {"image": PICTURE, "strength": 0.5, "guidance_scale": 3.0, "max_sequence_length": 64},
    ),
    "flux2 with a reference": (
        flux2,
        {
            "image": [Image.new("RGB", (64, 64), "red")],
            "max_sequence_length": 96,
            "text_encoder_out_layers": (0, 1, 2),
        },
    ),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_forms_that_begin_from_a_picture(form: tuple[Callable[[], Any], dict], monkeypatch: pytest.MonkeyPatch) -> None:
    # Edit pipelines blow their pictures up to a megapixel.
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: (32, 32, None))
    make, given = form
    pipe, layouts, context = make(), [], Context(by=0.0)
    expected = redraw(pipe, **given)
    with ac.control(pipe):
        assert torch.equal(redraw(pipe, **given), expected)
    controls = (
        Inputs(edit=lambda call: (layouts.append(call.queries), call)[1], where=ALL, branches=("cond", "uncond")),
        Output(edit=lambda output: output, where=ALL, branches=("cond", "uncond")),
        Guide(make=lambda prediction: prediction.combined),
        Noise(edit=lambda noise: noise),
        context,
    )
    with ac.control(pipe, *controls) as run:
        torch.testing.assert_close(redraw(pipe, **given), expected, atol=1e-4, rtol=1e-4)
        found = run.sampling.encode([tiny.PROMPT, tiny.PROMPT.replace("dog", "bird")]).positive
    assert all(layout.grid == (1, 4, 6) for layout in layouts)
    torch.testing.assert_close(found[:1], context.got[0].positive, atol=1e-4, rtol=1e-4)
    assert (found[0] - found[1]).norm(dim=-1).argmax().item() in run.sampling.find("dog")


def test_skip_layer_guidance_is_left_alone() -> None:
    """Its further call sees no control, and what it predicts is not taken for the conditional prediction."""
    pipe, branches, guide = sd3(), [], Guide()
    more = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    expected = draw(pipe, FAMILIES["sd3"], **more)
    both = {"where": ALL, "branches": ("cond", "uncond")}
    edit = Inputs(edit=lambda call: (branches.append(call.branch), call)[1], **both)
    with ac.control(pipe, guide, edit):
        torch.testing.assert_close(draw(pipe, FAMILIES["sd3"], **more), expected, atol=1e-4, rtol=1e-4)
    assert branches.count("cond") == branches.count("uncond") == 3 * 3
    answer = guide.got[-1]
    torch.testing.assert_close(answer.again(None), answer.cond, atol=1e-4, rtol=1e-4)


def test_layers_that_keep_reference_tokens_are_refused() -> None:
    pipe = flux2()
    pipe.transformer.transformer_blocks[0].attn.set_processor(Flux2KVAttnProcessor())
    with (
        pytest.raises(ac.ControlError, match=r"Flux2KVAttnProcessor has taken over at transformer_blocks\.0\.attn"),
        ac.control(pipe, Inputs(where=ALL)),
    ):
        pass


def test_cached_reference_tokens_are_refused() -> None:
    """With a cache the reference tokens come first, and only in the first step."""
    pipe = flux2()
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "kv_cache_mode": "extract"}), with_kwargs=True
    )
    with pytest.raises(ac.ControlError, match="cached reference tokens"), ac.control(pipe, Noise()):
        draw(pipe, FAMILIES["flux2"])


def test_compiled_transformers_are_refused_where_nothing_takes_masks() -> None:
    pipe = sd3()
    pipe.transformer.compile(backend="eager")
    with (
        pytest.raises(ac.ControlError, match="SD3Transformer2DModel is compiled"),
        ac.control(pipe, Inputs(where=ALL)),
    ):
        draw(pipe, FAMILIES["sd3"])
