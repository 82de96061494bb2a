"""Plug-and-Play against its card; and the hooks through which features are edited."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import attnctrl as ac
from attnctrl.processors import family_of
from tests import tiny
from tests.editing.material import EDIT, SOURCE, draw, latents
from tests.probes import Nudge
from tests.spies import assert_restored, snapshot
from tests.transformers import FAMILIES
from tests.transformers import draw as draw_joint

FEATURES = ac.PlugAndPlay(attention_until=0.0)
TAKEN = "up_blocks.0.resnets.1"


def added(name: str, *controls: ac.Control) -> list[torch.Tensor]:
    """What a residual block adds to its input in each of three steps: rows [uncond, cond] of [source, edit]."""
    pipe, found = tiny.sd(), []

    def keep(block: Any, args: tuple, output: torch.Tensor) -> None:
        passed = args[0] if block.conv_shortcut is None else block.conv_shortcut(args[0])
        found.append(output * block.output_scale_factor - passed)

    pipe.unet.get_submodule(name).register_forward_hook(keep)
    draw(pipe, [SOURCE, EDIT], *controls)
    return found


def test_residual_blocks_stand_before_the_attention_that_follows_them() -> None:
    family = family_of(tiny.sdxl())
    sites, blocks = [s for s, _ in family.sites()], [s for s, _ in family.residuals()]
    assert [b.name for b in blocks] == [
        "down_blocks.0.resnets.0",
        "down_blocks.1.resnets.0",
        "mid_block.resnets.0",
        "mid_block.resnets.1",
        "up_blocks.0.resnets.0",
        "up_blocks.0.resnets.1",
        "up_blocks.1.resnets.0",
        "up_blocks.1.resnets.1",
    ]
    second = blocks[5]
    assert sites[second.order].name.startswith("up_blocks.0.attentions.1")
    assert sites[second.order - 1].name.startswith("up_blocks.0.attentions.0")
    assert [b.depth for b in blocks] == [0, 1, 1, 1, 1, 1, 0, 0]


def test_one_block_adds_the_sources_features_until_its_step() -> None:
    control = ac.PlugAndPlay(attention_until=0.0, features_until=0.5)
    first, second, third = added(TAKEN, control)
    for rows in (first, second):
        torch.testing.assert_close(rows[1], rows[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(rows[3], rows[2], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(rows[0], rows[2], atol=1e-4)  # each branch its own
    assert not torch.allclose(third[3], third[2], atol=1e-4)
    other = added("up_blocks.0.resnets.0", control)
    assert not torch.allclose(other[0][3], other[0][2], atol=1e-4)


def test_queries_and_keys_are_the_sources_from_that_block_on() -> None:
    with ac.control(tiny.sd(), ac.PlugAndPlay(features_until=0.0), record=False) as run:
        tiny.draw(run.pipe, [SOURCE, EDIT], latents=latents())
    (row,) = run.report.rows.values()
    assert row.point == "inputs"
    assert row.steps == {0, 1, 2}
    assert row.sites == {n for n in row.sites if n.startswith("up_blocks")}
    state = run.samplings[0].active[0].state
    blocks = {name.split(".transformer_blocks")[0] for name in state.names}
    assert blocks == {"up_blocks.0.attentions.1", "up_blocks.1.attentions.0", "up_blocks.1.attentions.1"}


def test_the_report_counts_features() -> None:
    with ac.control(tiny.sd(), FEATURES, record=False) as run:
        tiny.draw(run.pipe, [SOURCE, EDIT], latents=latents())
        tiny.draw(run.pipe, [SOURCE, EDIT], latents=latents())
        assert len(run.hooks) == 1
    row = next(row for row in run.report.rows.values() if row.point == "features")
    assert row.sites == {TAKEN}
    assert row.steps == {0, 1, 2}
    assert row.calls == 6  # two branches


def test_the_source_does_not_notice_and_the_model_is_restored() -> None:
    pipe = tiny.sd()
    before, stock = snapshot(pipe), draw(pipe, [SOURCE, EDIT])
    edited = draw(pipe, [SOURCE, EDIT], ac.PlugAndPlay())
    assert torch.equal(edited[0], stock[0])
    assert not torch.allclose(edited[1], stock[1], atol=1e-4)
    with pytest.raises(ac.ControlError, match="prompt=\\[source, edit\\]"):
        draw(pipe, [SOURCE], ac.PlugAndPlay(), latents=None)
    assert_restored(before, pipe)


def test_equal_prompts_give_the_stock_picture() -> None:
    pipe = tiny.sd()
    same = [SOURCE, SOURCE]
    torch.testing.assert_close(draw(pipe, same, ac.PlugAndPlay()), draw(pipe, same), atol=1e-6, rtol=1e-6)


def test_another_thread_on_the_same_model_is_left_alone() -> None:
    pipe = tiny.sd()
    other, results = ac.share(pipe), []
    stock = draw(other, [SOURCE, EDIT])
    plain = threading.Thread(target=lambda: results.append(draw(other, [SOURCE, EDIT], Nudge(by=0.0))))

    def start(pipe: Any, index: int, timestep: Any, values: dict) -> dict:
        if index == 0:
            plain.start()
            plain.join()
        return values

    draw(pipe, [SOURCE, EDIT], FEATURES, callback_on_step_end=start)
    torch.testing.assert_close(results[0], stock, atol=1e-6, rtol=1e-6)


def test_it_works_beside_others() -> None:
    pipe = tiny.sd()
    alone = draw(pipe, [SOURCE, EDIT], ac.PlugAndPlay())
    both = draw(pipe, [SOURCE, EDIT], ac.PlugAndPlay(), ac.PromptToPrompt())
    assert torch.isfinite(both).all()
    assert not torch.allclose(both[1], alone[1], atol=1e-4)


def test_models_without_a_decoder_are_refused() -> None:
    family = FAMILIES["flux"]
    with (
        pytest.raises(ac.ControlError, match="features of a UNet's decoder"),
        ac.control(family.make(), ac.PlugAndPlay(), record=False) as run,
    ):
        draw_joint(run.pipe, family, [SOURCE, EDIT])
