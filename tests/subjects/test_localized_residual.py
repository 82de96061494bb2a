"""LAG sampling of Personalized Residuals against its card."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnctrl as ac
from attnctrl.controls.subjects.localized_residual import THRESHOLDS, above
from tests import tiny
from tests.subjects.material import LEFT, PROMPT

peft = pytest.importorskip("peft")


def with_lora(*targets: str, name: str = "mine", pipe: Any = None, seed: int = 0) -> Any:
    """The tiny pipeline with a LoRA that does something."""
    pipe = pipe or tiny.sd()
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=list(targets)), adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    for at, parameter in pipe.unet.named_parameters():
        if f"lora_B.{name}" in at:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return pipe


def drawn(pipe: Any, *controls: ac.Control, prompt: str = PROMPT) -> torch.Tensor:
    with ac.control(pipe, *controls, record=False):
        return tiny.draw(pipe, prompt)


def first_output(pipe: Any, *controls: ac.Control) -> torch.Tensor:
    """What the first transformer block of the UNet gives in the first step."""
    outputs: list[torch.Tensor] = []
    block = pipe.unet.down_blocks[0].attentions[0].proj_out
    handle = block.register_forward_hook(lambda module, given, output: outputs.append(output.clone()))
    drawn(pipe, *controls)
    handle.remove()
    return outputs[0]


def test_the_thresholds() -> None:
    even = torch.tensor([[4.0, 1.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    assert above(even, "median").tolist() == [[True, False, True, False], [False] * 4]
    small = torch.tensor([[0.1, 0.1, 0.2, 9.0]])
    assert above(small, "otsu").tolist() == [[False, False, False, True]]


def test_inside_its_region_it_is_the_lora_and_outside_the_base_model() -> None:
    base = first_output(tiny.sd())
    pipe = with_lora("proj_out")
    full = first_output(pipe)
    got = first_output(pipe, ac.LocalizedResidual("cat", LEFT))
    half = got.shape[-1] // 2
    torch.testing.assert_close(got[..., :half], full[..., :half], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[..., half:], base[..., half:], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(full[..., half:], base[..., half:], atol=1e-2)


def test_the_whole_picture_is_the_lora_and_no_word_the_base_model() -> None:
    stock = drawn(tiny.sd())
    pipe = with_lora("proj_out", "to_q")
    full = drawn(pipe)
    whole = drawn(pipe, ac.LocalizedResidual("cat", (0.0, 0.0, 1.0, 1.0)))
    torch.testing.assert_close(whole, full, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(full, stock, atol=1e-2)
    second = ac.LocalizedResidual("bird", LEFT)
    with ac.control(pipe, second, record=False):
        both = tiny.draw(pipe, ["a bird", PROMPT], latents=torch.ones(2, 4, 16, 16))
    wanted = tiny.draw(tiny.sd(), ["a bird", PROMPT], latents=torch.ones(2, 4, 16, 16))
    torch.testing.assert_close(both[1], wanted[1], atol=1e-3, rtol=1e-3)
    assert not torch.allclose(both[0], wanted[0], atol=1e-2)


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_its_place_is_read_in_the_attention(threshold: str) -> None:
    pipe = with_lora("proj_out", "proj_in", "to_k", "conv1", "time_emb_proj")
    cat, dog = (drawn(pipe, ac.LocalizedResidual(word, threshold=threshold)) for word in ("cat", "dog"))
    assert torch.isfinite(cat).all()
    assert not torch.allclose(cat, drawn(pipe), atol=1e-3)
    assert not torch.allclose(cat, dog, atol=1e-4)


def test_two_loras_have_a_place_each() -> None:
    pipe = with_lora("proj_out", name="one")
    with_lora("proj_out", name="two", pipe=pipe, seed=1)
    pipe.unet.set_adapter(["one", "two"])
    both = first_output(pipe)
    left = ac.LocalizedResidual("cat", LEFT, adapters=("one",))
    got = first_output(pipe, left)
    half = got.shape[-1] // 2
    torch.testing.assert_close(got[..., :half], both[..., :half], atol=1e-5, rtol=1e-5)
    pipe.unet.set_adapter(["two"])
    torch.testing.assert_close(got[..., half:], first_output(pipe)[..., half:], atol=1e-5, rtol=1e-5)
    with pytest.raises(ac.ControlError, match="active adapters: two"):
        drawn(pipe, left)


def test_as_it_is() -> None:
    pipe = with_lora("proj_out")
    stock = drawn(pipe)
    for control in (ac.LocalizedResidual("cat", outside=1.0), ac.LocalizedResidual()):
        assert control.idle
        assert torch.equal(drawn(pipe, control), stock)
    drawn(pipe, ac.LocalizedResidual("cat"))
    assert torch.equal(drawn(pipe), stock)  # no hook is left


def test_without_a_lora_it_says_so() -> None:
    off = with_lora("proj_out")
    off.unet.disable_adapters()
    for pipe in (tiny.sd(), off, with_lora("attn2.to_k")):
        with pytest.raises(ac.ControlError, match="finds no LoRA that acts on latents"):
            drawn(pipe, ac.LocalizedResidual("cat"))
    with pytest.raises(ac.ControlError, match='"bird" is not in the prompt'):
        drawn(with_lora("proj_out"), ac.LocalizedResidual("bird"))
