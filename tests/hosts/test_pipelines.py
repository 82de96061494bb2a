"""The pipeline in the hands of its users: LoRA, IP-Adapter, offload, callbacks, embeddings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from peft import LoraConfig

import attnctrl as ac
from tests import tiny
from tests.probes import REGIONS, Mask, Nudge, all_visible, only_first_key
from tests.spies import assert_restored, attention_layers, snapshot

PROMPTS = ["a cat and a dog", "the red bird and a cat"]


@pytest.fixture
def lora() -> Any:
    pipe = tiny.sd()
    torch.manual_seed(1)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    return pipe


def test_a_lora_is_part_of_the_model(lora: Any) -> None:
    expected, bare = tiny.draw(lora), tiny.draw(tiny.sd())
    assert not torch.allclose(expected, bare, atol=1e-3)
    before = snapshot(lora)
    with ac.control(lora, record=["cat"]):
        assert torch.equal(tiny.draw(lora), expected)
    everywhere = ac.Where(kinds=("cross", "self"))
    with ac.control(lora, Mask(make=all_visible, where=everywhere, branches=("cond", "uncond"))):
        torch.testing.assert_close(tiny.draw(lora), expected, atol=1e-4, rtol=1e-4)
    with ac.control(lora, ac.RegionMask(REGIONS), ac.LoCo(REGIONS, iterations=1)) as run:
        assert not torch.allclose(tiny.draw(lora), expected, atol=1e-3)
    assert run.losses
    assert_restored(before, lora)


def ip_adapter(pipe: Any) -> Any:
    """Put a random IP-Adapter of 4 image tokens on a pipeline, as `load_ip_adapter` does."""
    torch.manual_seed(2)
    for layer in attention_layers(pipe, "cross").values():
        layer.set_processor(IPAdapterAttnProcessor2_0(layer.inner_dim, 16, num_tokens=(4,)))
    projection = ImageProjection(image_embed_dim=8, cross_attention_dim=16, num_image_text_embeds=4)
    pipe.unet.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    pipe.unet.config.encoder_hid_dim_type = "ip_image_proj"
    return [torch.randn(2, 1, 8)]


def test_an_ip_adapter_works_on_beside_controls_that_leave_its_layers_alone() -> None:
    pipe = tiny.sd()
    image = ip_adapter(pipe)
    expected, before = tiny.draw(pipe, ip_adapter_image_embeds=image), snapshot(pipe)
    other = tiny.draw(pipe, ip_adapter_image_embeds=[-image[0]])
    assert not torch.allclose(expected, other, atol=1e-4)
    with ac.control(pipe):
        assert torch.equal(tiny.draw(pipe, ip_adapter_image_embeds=image), expected)
    own = ac.Where(kinds=("self",))
    with ac.control(pipe, Mask(make=only_first_key, where=own), Nudge()):
        drawn = tiny.draw(pipe, ip_adapter_image_embeds=image)
    with ac.control(pipe, Mask(make=only_first_key, where=own), Nudge()):
        without = tiny.draw(pipe, ip_adapter_image_embeds=[-image[0]])
    assert not torch.allclose(drawn, expected, atol=1e-3)
    assert not torch.allclose(drawn, without, atol=1e-5)  # the adapter acted in the controlled run
    with (
        pytest.raises(ac.ControlError, match=r"RegionMask needs cross-attention, which IPAdapter.*unload_ip_adapter"),
        ac.control(pipe, ac.RegionMask(REGIONS)),
    ):
        pytest.fail("the block was entered")
    assert_restored(before, pipe)


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_offload(offload: str) -> None:
    pipe = tiny.sd()
    controls = (ac.RegionMask(REGIONS), ac.LoCo(REGIONS, iterations=1))
    with ac.control(pipe, *controls):
        expected = tiny.draw(pipe)
    stock = tiny.draw(pipe)
    if offload == "model":
        pipe.unet, hook = cpu_offload_with_hook(pipe.unet, execution_device="cpu")
        assert hook is not None
    else:
        cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
        assert next(pipe.unet.parameters()).device.type == "meta"
    before = snapshot(pipe)
    with ac.control(pipe):
        assert torch.equal(tiny.draw(pipe), stock)
    with ac.control(pipe, *controls):
        torch.testing.assert_close(tiny.draw(pipe), expected, atol=1e-5, rtol=1e-5)
    assert_restored(before, pipe)
    assert torch.equal(tiny.draw(pipe), stock)


def test_callbacks_and_progress_bars(capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tiny.sd()
    pipe.set_progress_bar_config(disable=False)
    seen = []

    def callback(pipe: Any, index: int, timestep: Any, values: dict) -> dict:
        seen.append((index, float(timestep)))
        return {"latents": torch.zeros_like(values["latents"])}

    with ac.control(pipe, ac.LoCo(REGIONS, iterations=1)) as run:
        drawn = tiny.draw(pipe, callback_on_step_end=callback)
    assert [index for index, _ in seen] == [0, 1, 2]
    assert (drawn == 0).all()
    assert "3/3" in capsys.readouterr().err
    assert [v.step for v in run.losses] == [0, 1]


def embeddings(pipe: Any, prompt: Any) -> dict[str, torch.Tensor]:
    positive, negative, *pooled = pipe.encode_prompt(
        prompt=prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    found = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
    if pooled:
        found |= {"pooled_prompt_embeds": pooled[0], "negative_pooled_prompt_embeds": pooled[1]}
    return found


@pytest.mark.parametrize("model", [tiny.sd, tiny.sdxl])
def test_embeddings_without_a_prompt(model: Any) -> None:
    pipe, control = model(), ac.RegionMask(REGIONS)
    with ac.control(pipe, control):
        expected = tiny.draw(pipe)
    stock, made = tiny.draw(pipe), embeddings(pipe, tiny.PROMPT)
    with ac.control(pipe):
        assert torch.equal(tiny.draw(pipe, None, **made), stock)
    sentence = r'"cat" cannot be looked up.*control\(pipe, \.\.\., prompt=\.\.\.\)'
    with pytest.raises(ac.ControlError, match=sentence), ac.control(pipe, control):
        tiny.draw(pipe, None, **made)
    with pytest.raises(ac.ControlError, match=r'"dog" cannot be looked up'), ac.control(pipe, record=["dog"]):
        tiny.draw(pipe, None, **made)
    with ac.control(pipe, control, prompt=tiny.PROMPT):
        assert torch.equal(tiny.draw(pipe, None, **made), expected)
    sentence = r"names 2 prompts for embeddings of 1"
    with pytest.raises(ac.ControlError, match=sentence), ac.control(pipe, control, prompt=PROMPTS):
        tiny.draw(pipe, None, **made)


def test_sdxl_with_a_second_prompt() -> None:
    """Tokens of a phrase are those of either encoder; the second prompt may lack the phrase."""
    pipe = tiny.sdxl()
    with ac.control(pipe, ac.RegionMask(REGIONS)) as run:
        tiny.draw(pipe, "a cat and a dog", prompt_2="red cat", steps=1)
    assert run.sampling is not None
    assert run.sampling.find("cat") == (2,)  # position 2 in both prompts
    assert run.sampling.find("dog") == (5,)
    with ac.control(pipe, ac.RegionMask(REGIONS)) as run:
        tiny.draw(pipe, "a cat and a dog", prompt_2="the red cat", steps=1)
    assert run.sampling is not None
    assert run.sampling.find("cat") == (2, 3)


def test_what_the_pipeline_takes_besides_goes_on_working() -> None:
    pipe = tiny.sd()
    more = {"negative_prompt": "red", "guidance_rescale": 0.5}
    stock = tiny.draw(pipe, **more)
    with ac.control(pipe):
        assert torch.equal(tiny.draw(pipe, **more), stock)
    with ac.control(pipe, ac.RegionPrompts(REGIONS), ac.DenseDiffusion(REGIONS)):
        drawn = tiny.draw(pipe, **more)
    assert torch.isfinite(drawn).all()
    assert not torch.allclose(drawn, stock, atol=1e-3)
