"""The loss point: latents descend the gradient, by the right amount and at the right cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import attnctrl as ac
from attnctrl.control import Descent, Loss
from tests import tiny
from tests.probes import Mask, Token, only_first_key
from tests.spies import attention_layers, spied_steps, watched

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2"


MID = ac.Where(blocks=("mid",))


def gradient(pipe: Any, position: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """The denoiser's input of the first step, and the gradient of `Token`'s loss there, by plain PyTorch."""
    stock: dict[str, Any] = {}

    def capture(module: Any, args: tuple, kwargs: dict) -> None:
        stock.setdefault("call", (args, kwargs))

    handle = pipe.unet.register_forward_pre_hook(capture, with_kwargs=True)
    tiny.draw(pipe, steps=2)
    handle.remove()
    (sample, timestep), kwargs = stock["call"]
    leaf = sample[1:].detach().clone().requires_grad_(True)
    layer = attention_layers(pipe)[LAYER]
    caught = {}
    handles = [
        layer.to_q.register_forward_hook(lambda m, a, output: caught.update(q=output)),
        layer.to_k.register_forward_hook(lambda m, a, output: caught.update(k=output)),
    ]
    with torch.enable_grad():
        pipe.unet(leaf, timestep, encoder_hidden_states=kwargs["encoder_hidden_states"][1:])
        q, k = (caught[n].unflatten(-1, (layer.heads, -1)).transpose(1, 2) for n in "qk")
        probs = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1)
        loss = probs.mean(dim=1)[..., position].mean()
        (grad,) = torch.autograd.grad(loss, leaf)
    for handle in handles:
        handle.remove()
    return sample, grad


@pytest.mark.parametrize("scheduler", tiny.PROMISED)
def test_the_latents_move_by_scale_times_gradient(scheduler: str) -> None:
    """The denoiser's input moves by -scale * gradient in both branches; the sampler's latents by as much unscaled."""
    pipe = tiny.sd(scheduler)
    sample, grad = gradient(pipe)
    scale = 1.0 / float(grad.abs().max())
    with spied_steps(pipe) as stock:
        tiny.draw(pipe, steps=2)
    control = Token(scale=scale, where=MID, window=ac.Window(0.0, 0.5))
    with spied_steps(pipe) as steps, ac.control(pipe, control), watched(pipe) as seen:
        tiny.draw(pipe, steps=2)
    torch.testing.assert_close(seen.samples[0] - sample, (-scale * grad).expand(2, -1, -1, -1), atol=1e-4, rtol=1e-3)
    pipe.scheduler.set_timesteps(2)
    factor = float(pipe.scheduler.scale_model_input(torch.ones(1), pipe.scheduler.timesteps[0]))
    assert (factor < 0.1) == (scheduler == "euler")  # the one of the four that scales the denoiser's input
    moved = steps[0][1] - stock[0][1]
    torch.testing.assert_close(moved * factor, -scale * grad, atol=1e-4, rtol=1e-3)


def test_a_loss_moves_down_and_its_opposite_up() -> None:
    pipe = tiny.sd()
    values = {}
    for sign in (1.0, -1.0):
        with ac.control(pipe, Token(sign=sign, scale=2000.0, iterations=3, where=MID)) as run:
            tiny.draw(pipe, steps=1)
        values[sign] = [v.values[0] for v in run.losses]
        assert values[sign] == sorted(values[sign], reverse=True)
        assert values[sign][0] > values[sign][-1]
    assert values[1.0][0] == -values[-1.0][0]


def count_calls(pipe: Any, *controls: ac.Control) -> dict[str, int]:
    calls = dict.fromkeys(["down_blocks.0", "mid_block", "up_blocks.1", "conv_out"], 0)

    def count(name: str) -> Any:
        def hook(*args: Any) -> None:
            calls[name] += 1

        return hook

    handles = [pipe.unet.get_submodule(name).register_forward_pre_hook(count(name)) for name in calls]
    with ac.control(pipe, *controls):
        tiny.draw(pipe, steps=2)
    for handle in handles:
        handle.remove()
    return calls


def test_the_forward_for_a_loss_stops_after_the_last_site_that_it_reads() -> None:
    pipe = tiny.sd()
    down = Token(where=ac.Where(blocks=("down",)))
    mid = Token(where=ac.Where(kinds=("cross", "self"), blocks=("mid",)), iterations=3)
    assert count_calls(pipe, down) == {"down_blocks.0": 4, "mid_block": 2, "up_blocks.1": 2, "conv_out": 2}
    assert count_calls(pipe, mid) == {"down_blocks.0": 8, "mid_block": 8, "up_blocks.1": 2, "conv_out": 2}
    # Two losses share one pass per iteration, which ends after the later one's last site.
    assert count_calls(pipe, down, mid) == {"down_blocks.0": 8, "mid_block": 8, "up_blocks.1": 2, "conv_out": 2}


def test_weights_track_no_gradients_while_a_loss_is_at_work() -> None:
    """They would keep the activations of every layer; afterwards each tracks them as before."""
    pipe = tiny.sd()
    trained = pipe.unet.conv_in.weight.requires_grad_(False)
    before = {n: p.requires_grad for n, p in pipe.unet.named_parameters()}
    assert any(before.values())
    with ac.control(pipe, Token(scale=0.0)):
        assert not any(p.requires_grad for p in pipe.unet.parameters())
        with ac.control(pipe, Token(scale=0.0)):
            pass
        assert not any(p.requires_grad for p in pipe.unet.parameters())
    assert {n: p.requires_grad for n, p in pipe.unet.named_parameters()} == before
    assert not trained.requires_grad
    with ac.control(pipe, Mask()):
        assert {n: p.requires_grad for n, p in pipe.unet.named_parameters()} == before


def test_two_losses_move_together() -> None:
    pipe = tiny.sd()
    where = ac.Where(blocks=("mid",))
    one, two = Token(position=2, scale=500.0, where=where), Token(position=5, scale=300.0, where=where)
    moves = []
    for controls in ((one,), (two,), (one, two)):
        with ac.control(pipe, *controls), watched(pipe) as seen:
            tiny.draw(pipe, steps=1)
        moves.append(seen.samples[0])
    with ac.control(pipe), watched(pipe) as seen:
        tiny.draw(pipe, steps=1)
    start = seen.samples[0]
    torch.testing.assert_close(moves[2] - start, (moves[0] - start) + (moves[1] - start), atol=1e-5, rtol=1e-4)


@dataclass(frozen=True)
class Second(Token):
    """Done for every picture but the second."""

    def loss(self, maps: Any, step: Any, state: Any) -> Loss:
        loss = super().loss(maps, step, state)
        return Loss(loss.value, torch.arange(len(loss.value)) != 1)


def test_each_picture_stops_on_its_own() -> None:
    pipe = tiny.sd()
    with ac.control(pipe), watched(pipe) as stock:
        tiny.draw(pipe, steps=1, num_images_per_prompt=3)
    with ac.control(pipe, Second(scale=2000.0, iterations=2)) as run, watched(pipe) as seen:
        tiny.draw(pipe, steps=1, num_images_per_prompt=3)
    moved = (seen.samples[0] - stock.samples[0]).abs().amax(dim=(1, 2, 3))
    assert (moved[[0, 2, 3, 5]] == 0).all()
    assert (moved[[1, 4]] > 1e-3).all()
    assert len(run.losses) == 2


@dataclass(frozen=True)
class AllDone(Token):
    def loss(self, maps: Any, step: Any, state: Any) -> Loss:
        loss = super().loss(maps, step, state)
        return Loss(loss.value, torch.ones_like(loss.value, dtype=torch.bool))


def test_a_loss_that_is_content_costs_one_forward_and_changes_nothing() -> None:
    pipe = tiny.sd()
    expected = tiny.draw(pipe, steps=2)
    with ac.control(pipe, AllDone(iterations=5, scale=1000.0)) as run:
        assert torch.equal(tiny.draw(pipe, steps=2), expected)
    assert [(v.step, v.iteration) for v in run.losses] == [(0, 0), (1, 0)]


def test_the_descent_sees_the_other_controls() -> None:
    """A loss is taken on the maps that the masks of the same run leave."""
    pipe = tiny.sd()
    token, mask = Token(where=MID), Mask(make=only_first_key)
    with ac.control(pipe, token) as free:
        tiny.draw(pipe, steps=1)
    with ac.control(pipe, token, mask) as masked:
        tiny.draw(pipe, steps=1)
    assert free.losses[0].values[0] > 0.01
    assert masked.losses[0].values[0] == 0


@dataclass(frozen=True)
class Broken(Token):
    def descent(self, step: Any) -> Descent:
        return Descent(float("inf"))


def test_a_gradient_that_is_not_finite_is_an_error() -> None:
    pipe = tiny.sd()
    expected = tiny.draw(pipe, steps=1)
    with pytest.raises(ac.ControlError, match=r"gradient of Broken is not finite"), ac.control(pipe, Broken()):
        tiny.draw(pipe, steps=1)
    assert torch.equal(tiny.draw(pipe, steps=1), expected)


@pytest.mark.parametrize("scheduler", ["heun", "pndm"])
def test_schedulers_that_evaluate_twice(scheduler: str) -> None:
    pipe = tiny.sd(scheduler)
    stock = tiny.draw(pipe)
    with ac.control(pipe, Token(scale=2000.0)) as run:
        drawn = tiny.draw(pipe)
    assert torch.isfinite(drawn).all()
    assert not torch.allclose(drawn, stock, atol=1e-3)
    assert len({v.step for v in run.losses}) == len(run.losses)  # at most one descent per visit
