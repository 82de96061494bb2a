"""The loss point under gradient checkpointing, inference mode and autograd's own threads."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import attnctrl as ac
from attnctrl import descend
from tests import tiny
from tests.probes import REGIONS, Mask, Token, only_first_key

MID = ac.Where(blocks=("mid",))


LOSSES: dict[str, tuple[ac.Control, ...]] = {
    "refocus": (ac.Refocus(REGIONS, window=ac.Window(0.0, 0.1)),),
    "loco": (ac.LoCo(REGIONS, iterations=2),),
    "loco under dense-diffusion": (ac.LoCo(REGIONS, iterations=2), ac.DenseDiffusion(REGIONS)),
    "a-star under region-prompts": (ac.AStar(("cat", "dog"), window=ac.Window(0.4, 1.0)), ac.RegionPrompts(REGIONS)),
    "attend-excite under region-mask": (ac.AttendExcite(("cat", "dog")), ac.RegionMask(REGIONS)),
}


@pytest.mark.parametrize("case", LOSSES)
def test_gradient_checkpointing_and_inference_mode_give_the_same_picture(case: str) -> None:
    """ComfyUI samples under inference mode; the states, texts and latents made there cannot carry a gradient."""
    pipe = tiny.sd("euler")
    with ac.control(pipe, *LOSSES[case]) as run:
        expected = tiny.draw(pipe)
    assert run.losses
    assert not torch.allclose(expected, tiny.draw(pipe), atol=1e-3)
    with torch.inference_mode(), ac.control(pipe, *LOSSES[case]):
        torch.testing.assert_close(tiny.draw(pipe), expected, atol=1e-4, rtol=1e-4)
    pipe.unet.enable_gradient_checkpointing()
    with ac.control(pipe, *LOSSES[case]):
        torch.testing.assert_close(tiny.draw(pipe), expected, atol=1e-4, rtol=1e-4)
    with torch.inference_mode(), ac.control(pipe, *LOSSES[case]):
        torch.testing.assert_close(tiny.draw(pipe), expected, atol=1e-4, rtol=1e-4)
    assert all(p.grad is None for p in pipe.unet.parameters())


def test_checkpointing_does_recompute() -> None:
    """The test above means something: the controlled layers run again in the backward pass, with their mask."""
    pipe, calls = tiny.sd(), []
    counting = Mask(make=lambda call: (calls.append(torch.is_grad_enabled()), only_first_key(call))[1], where=MID)
    counts = []
    for checkpointing in (False, True):
        if checkpointing:
            pipe.unet.enable_gradient_checkpointing()
        calls.clear()
        with ac.control(pipe, Token(where=ac.Where(blocks=("up",))), counting):
            tiny.draw(pipe, steps=1)
        counts.append(sum(calls))
    assert counts == [1, 2]


def test_checkpointing_in_autograds_own_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the backward pass, and with it the recomputation, runs in a thread that knows no context variable."""
    pipe, controls = tiny.sd(), (ac.LoCo(REGIONS, iterations=2), ac.DenseDiffusion(REGIONS))
    with ac.control(pipe, *controls):
        expected = tiny.draw(pipe, steps=2)
    pipe.unet.enable_gradient_checkpointing()
    threads = []

    def elsewhere(*args: Any) -> torch.Tensor:
        results: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: results.append(stock(*args)))
        threads.append(thread)
        thread.start()
        thread.join()
        return results[0]

    stock = descend._gradient
    monkeypatch.setattr(descend, "_gradient", elsewhere)
    with ac.control(pipe, *controls):
        torch.testing.assert_close(tiny.draw(pipe, steps=2), expected, atol=1e-4, rtol=1e-4)
    assert len(threads) == 2
