"""What is particular to video pipelines: two experts, given videos, text projections, padding, torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import CogVideoXVideoToVideoPipeline, LTXImageToVideoPipeline, WanVideoToVideoPipeline
from diffusers.pipelines.wan import pipeline_wan_video2video
from PIL import Image

import attnctrl as ac
from attnctrl.sites import Call
from tests import tiny
from tests.parts import TOKENS, Tiny
from tests.probes import REGIONS, Inputs, Mask, Token
from tests.transformers import draw
from tests.videos import VIDEOS, cogvideox, hunyuan, ltx, mochi
from tests.wan import FTFY, wan, wan_experts

ALL = ac.Where(kinds=("self", "cross", "joint"))


def test_each_expert_is_controlled_in_its_own_steps() -> None:
    family, experts = VIDEOS["wan-experts"], {}
    pipe = wan_experts()

    def watch(call: Call) -> Call:
        experts.setdefault(call.step.index, set()).add(call.site.expert)
        return call

    with ac.control(pipe, Inputs(edit=watch, where=ALL), Token(scale=20.0)) as run:
        draw(pipe, family, steps=4)
    assert experts == {s.index: {int(s.timestep < 800)} for s in run.sampling.steps_seen}
    assert {0} in experts.values()
    assert {1} in experts.values()
    assert {loss.step for loss in run.losses} == set(experts)
    assert len({site.name for site in run.sampling.sites}) == len(run.sampling.sites) == family.sites


def redraw(pipe: Any, family: Tiny) -> torch.Tensor:
    height, width = family.size
    video = [Image.radial_gradient("L").convert("RGB").resize((width, height))] * 9
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        video=video,
        prompt=tiny.PROMPT,
        height=height,
        width=width,
        num_inference_steps=4,
        strength=0.8,
        max_sequence_length=TOKENS,
        output_type="latent",
        generator=torch.Generator().manual_seed(7),
        **family.guided,
    )[0]


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_video_to_video_begins_late(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_wan_video2video, "ftfy", FTFY, raising=False)
    kind, base = {"wan": (WanVideoToVideoPipeline, wan), "cogvideox": (CogVideoXVideoToVideoPipeline, cogvideox)}[name]
    parts = base().components
    pipe = kind(**{n: parts[n] for n in ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")})
    expected = redraw(pipe, VIDEOS[name])
    with ac.control(pipe):
        assert torch.equal(redraw(pipe, VIDEOS[name]), expected)
    with ac.control(pipe, Inputs(where=ALL, branches=("cond", "uncond"))) as run:
        torch.testing.assert_close(redraw(pipe, VIDEOS[name]), expected, atol=1e-4, rtol=1e-4)
    assert [step.progress for step in run.sampling.steps_seen] == [0.25, 0.5, 0.75]


def test_any_text_can_be_projected_to_keys_of_wan() -> None:
    family, calls = VIDEOS["wan"], []
    pipe = wan()
    with ac.control(pipe, Inputs(edit=lambda call: (calls.append(call), call)[1])) as run:
        draw(pipe, family)
    key, value = calls[0].project(run.sampling.encode([tiny.PROMPT]).positive)
    torch.testing.assert_close(key, calls[0].key)
    torch.testing.assert_close(value, calls[0].value)
    with ac.control(pipe, ac.RegionPrompts(REGIONS)):
        assert not torch.allclose(draw(pipe, family), draw(wan(), family), atol=1e-4)


def test_region_prompts_say_where_text_must_keep_its_length() -> None:
    pipe = hunyuan()
    message = r"a control made \d+ text tokens of \d+, but HunyuanVideo takes its padding to be the last ones"
    with pytest.raises(ac.ControlError, match=message), ac.control(pipe, ac.RegionPrompts(REGIONS)):
        draw(pipe, VIDEOS["hunyuan"])


@pytest.mark.parametrize("name", ["hunyuan", "ltx", "mochi"])
def test_padded_text_is_never_seen(name: str) -> None:
    family, seen = VIDEOS[name], []
    pipe = {"hunyuan": hunyuan, "ltx": ltx, "mochi": mochi}[name]()
    with ac.control(pipe, Mask(make=lambda call: seen.append(call))) as run:
        draw(pipe, family, steps=2)
    (tokens,) = run.sampling.tokens[0]
    mask = seen[0].mask[0, 0, 0, seen[0].keys.text]
    visible = mask if mask.dtype == torch.bool else mask > -1
    assert visible.tolist() == [i <= tokens.end for i in range(TOKENS)]


def test_the_text_refiner_of_hunyuan_stays_stock() -> None:
    pipe = hunyuan()
    refiner = [m for m in pipe.transformer.context_embedder.modules() if hasattr(m, "processor")]
    before = [m.processor for m in refiner]
    with ac.control(pipe, Inputs(where=ALL)):
        draw(pipe, VIDEOS["hunyuan"])
        assert all(m.processor is p for m, p in zip(refiner, before, strict=True))
    assert refiner


def test_controls_on_a_compiled_transformer_are_refused() -> None:
    family, pipe = VIDEOS["wan"], wan()
    expected = draw(pipe, family)
    pipe.transformer.compile(backend="eager")
    with ac.control(pipe):
        assert torch.equal(draw(pipe, family), expected)
    everything = Mask(make=lambda call: torch.ones(1, 1, 1, 1, dtype=torch.bool))
    message = "WanTransformer3DModel is compiled, and attnctrl controls it uncompiled only"
    with pytest.raises(ac.ControlError, match=message), ac.control(pipe, everything):
        draw(pipe, family)


def test_image_to_video_of_ltx_is_refused() -> None:
    pipe = LTXImageToVideoPipeline(**ltx().components)
    with pytest.raises(ac.ControlError, match="LTXImageToVideoPipeline"), ac.control(pipe):
        pass
