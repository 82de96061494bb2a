"""Edits of scenes, the instructions for them, and the model that learns both."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
import torch

from attnctrl.shapes import detect, load, models, render
from attnctrl.shapes.budget import Budget
from attnctrl.shapes.instructions import KINDS, instruction_for, sample_change, shortened, training_instruction
from attnctrl.shapes.tokenizer import encode_captions, load_tokenizer
from attnctrl.shapes.train import add_arguments, main, text_encoder
from attnctrl.shapes.train_instruct import (
    Instructed,
    InstructRecipe,
    draw_changes,
    render_change,
    train_instruct,
    widened,
    world_change,
)
from attnctrl.shapes.world import HELD_OUT, scene_rng
from tests.interrupted import check_resumed

LATENTS = torch.randn(8, 2, 4, 16, 16, generator=torch.Generator().manual_seed(0)).half()


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_changes_what_it_says(kind: str) -> None:
    for index in range(12):
        change = sample_change(scene_rng(3, index), kind)
        before, after = change.before, change.after
        kept = [t for t in before.things if t in after.things]
        assert len(before.things) - len(kept) == {"background": 0, "two": 2}.get(kind, 1)
        assert list(before.things[: len(kept)]) == kept == list(after.things[: len(kept)])
        assert (before.background != after.background) == (kind == "background")
        assert not {t.pair for t in after.things} & HELD_OUT
        for source, target in change.parts:
            colours, shapes = zip(source.split(), target.split(), strict=False) if target != "background" else ((), ())
            if kind == "recolour":
                assert colours[0] != colours[1]
                assert shapes[0] == shapes[1]
            if kind == "reshape":
                assert colours[0] == colours[1]
                assert shapes[0] != shapes[1]
            if kind == "replace":
                assert colours[0] != colours[1]
                assert shapes[0] != shapes[1]
        # Exact: the wanted picture shows what was asked, read without learning.
        found = {(o.colour, o.shape) for o in detect(render([after])[0]).objects}
        assert found == {t.pair for t in after.things}
        assert change.reversible == all(target != "background" for _, target in change.parts)


def test_the_way_back() -> None:
    change = sample_change(scene_rng(3, 0), "recolour")
    back = change.reversed()
    assert (back.before, back.after) == (change.after, change.before)
    assert back.parts == tuple((b, a) for a, b in change.parts)
    with pytest.raises(ValueError, match="never says where"):
        sample_change(scene_rng(3, 0), "remove").reversed()
    with pytest.raises(ValueError, match="unknown kind 'rotate'"):
        sample_change(scene_rng(3, 0), "rotate")


def test_instructions_in_the_words_that_the_tokenizer_has() -> None:
    assert instruction_for([("red circle", "blue circle"), ("green star", "background")]) == (
        "red circle to blue circle and green star to background"
    )
    with pytest.raises(ValueError, match="at least one"):
        instruction_for([])
    assert shortened("red circle", "blue circle") == "blue"
    assert shortened("red circle", "red star") == "star"
    assert shortened("white background", "black background") == "black"
    assert shortened("red circle", "blue star") == "blue star"
    assert shortened("red circle", "background") == "background"
    tokenizer, told = load_tokenizer(), set()
    for index in range(80):
        change = world_change(index)
        text = training_instruction(change, scene_rng(4, index))
        told.add(text)
        expected = tokenizer(text, padding="max_length", max_length=32).input_ids
        assert encode_captions([text])[0].tolist() == expected
        for source, _ in change.parts:
            assert source in text
    assert any(text.startswith(("a ", "an ")) for text in told)
    assert any(len(text.split()) == 4 for text in told)


def test_pairs_agree_where_nothing_changes() -> None:
    for index in range(10):
        change = world_change(index)
        before, after = render_change(change, index)
        apart = (before - after).abs().amax(dim=0).numpy()
        changed = [t for t in change.before.things if t not in change.after.things]
        if change.kind == "background":
            continue
        outside = np.ones((128, 128), bool)
        for thing in changed:
            y, x = np.mgrid[0:128, 0:128] / 128
            outside &= (x - thing.cx) ** 2 + (y - thing.cy) ** 2 > (1.25 * thing.r + 0.02) ** 2
        assert apart[outside].max() < 1e-4  # a thing's place is rounded with that of the largest
        assert apart.max() > 0.1


def test_batches_drop_text_and_picture() -> None:
    changes = [world_change(i) for i in range(8)]
    recipe = InstructRecipe(batch=4000, dropped=0.05)
    small = torch.ones(8, 2, 1, 1, 1)
    small[:, 1] = 2
    clean, noise, steps, pictures, ids = draw_changes(recipe, 3, small, changes)
    assert clean.shape == noise.shape == pictures.shape == (4000, 1, 1, 1)
    assert steps.shape == (4000,)
    empty, blank = (ids == encode_captions([""])).all(dim=1), (pictures == 0).flatten()
    shares = [float(rows.float().mean()) for rows in (empty & ~blank, ~empty & blank, empty & blank)]
    assert shares == pytest.approx([0.05] * 3, abs=0.012)
    # Of what is left some pairs run backwards, and never to the picture itself.
    forth, back = (clean == 2) & (pictures == 1), (clean == 1) & (pictures == 2)
    assert (forth | back).flatten()[~blank].all()
    reversible = sum(change.reversible for change in changes) / len(changes)
    assert float(back.flatten()[~blank].float().mean()) == pytest.approx(reversible / 2, abs=0.03)
    again = draw_changes(recipe, 3, small, changes)
    assert all(torch.equal(a, b) for a, b in zip((clean, noise, steps, pictures, ids), again, strict=True))


def test_a_widened_denoiser_begins_as_the_old_one() -> None:
    torch.manual_seed(0)
    unet = models.denoiser().eval()
    noisy, pictures = torch.randn(2, 2, 4, 16, 16)
    steps, ids = torch.tensor([3, 700]), encode_captions(["a red circle", ""])
    text = text_encoder().eval()
    with torch.no_grad():
        old = unet(noisy, steps, text(input_ids=ids).last_hidden_state).sample
        new = Instructed(widened(unet).eval(), text)(noisy, steps, pictures, ids)
    torch.testing.assert_close(new, old, atol=1e-5, rtol=1e-5)


def instruct(out, resume):
    torch.manual_seed(3)
    recipe = InstructRecipe(batch=2, warmup=1)
    budget = Budget(steps=4)
    return train_instruct(models.denoiser(), text_encoder(), LATENTS, out, budget, recipe, resume=resume)


def test_resumed_equals_uninterrupted(tmp_path, monkeypatch) -> None:
    check_resumed(instruct, tmp_path, monkeypatch)


def test_the_whole_command(tmp_path) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    line = f"instruct --out {tmp_path} --steps 2 --scenes 4 --batch 2 --device cpu --processes 1"
    assert main(parser.parse_args(line.split())) == 0
    pipe = load("instruct", folder=tmp_path / "pipeline")
    assert type(pipe).__name__ == "StableDiffusionInstructPix2PixPipeline"
    assert pipe.unet.config.in_channels == 8
    assert sum(p.stat().st_size for p in (tmp_path / "pipeline").rglob("*") if p.is_file()) <= 9e6
    assert torch.equal(pipe.vae.decoder.layers[0].weight, load("sd").vae.decoder.layers[0].weight)
    pipe.set_progress_bar_config(disable=True)
    given = {"image": render([world_change(0).before]), "num_inference_steps": 2, "output_type": "np"}
    assert pipe("red circle to blue", **given).images.shape == (1, 128, 128, 3)
