from __future__ import annotations

import numpy as np
import pytest
import torch

import attnctrl as ac
from attnctrl.calls import Signature
from attnctrl.processors.packing import pictures_of_blocks
from attnctrl.shapes import models, pretrained
from attnctrl.shapes.captions import phrase
from attnctrl.shapes.layouts import SIDES
from attnctrl.shapes.pretrained import assemble
from attnctrl.shapes.score import inscribed_box
from attnctrl.shapes.tokenizer import encode_captions, load_tokenizer
from attnctrl.shapes.train_entities import (
    BLOCKS,
    EntityRecipe,
    add_lora,
    draw_entities,
    entities_of,
    entity_inputs,
    loose_box,
    save_lora,
)
from attnctrl.shapes.train_flow import Velocity
from attnctrl.shapes.world import COLOURS, HALF_EXTENT, SHAPES, Thing, sample_scene, scene_rng
from tests import dit

LEFT, RIGHT = ac.Region("a red circle", box=(0.0, 0.0, 0.5, 1.0)), ac.Region("a blue star", box=(0.5, 0.0, 1.0, 0.5))
PROMPTS = ["a red circle and a blue star on a white background", "a red circle", "a green heart"]
REGIONS = [[LEFT, RIGHT], [LEFT], []]


def test_loose_boxes_by_hand() -> None:
    square = Thing("square", "red", 0.5, 0.5, 0.1)  # 0.168 wide and high
    assert loose_box(square, 1.0) == pytest.approx((0.416, 0.416, 0.584, 0.584))
    assert loose_box(square, 2.0) == pytest.approx((0.332, 0.416, 0.668, 0.584))
    assert loose_box(square, 0.5) == pytest.approx((0.416, 0.332, 0.584, 0.668))
    assert loose_box(Thing("square", "red", 0.12, 0.5, 0.1), 2.0) == pytest.approx((0.0, 0.416, 0.24, 0.584))


@pytest.mark.parametrize("shape", HALF_EXTENT)
def test_a_thing_is_the_largest_of_its_kind_in_its_loose_box(shape: str) -> None:
    for index in range(20):
        rng = scene_rng(5, index)
        r = float(rng.uniform(0.085, 0.21))
        thing = Thing(shape, "red", *(float(v) for v in rng.uniform(1.1 * r, 1 - 1.1 * r, 2)), r)
        low, high = SIDES
        box = loose_box(thing, float(rng.uniform(low / high, high / low)))
        assert inscribed_box(shape, box) == pytest.approx(thing.box)
        assert min(box) >= 0
        assert max(box) <= 1


def test_entities_name_every_thing_where_it_is() -> None:
    scene = sample_scene(scene_rng(0, 3), counts=3)
    regions = entities_of(scene, scene_rng(0, 4))
    assert [r.phrase for r in regions] == [phrase(t.shape, t.colour) for t in scene.things]
    for region, thing in zip(regions, scene.things, strict=True):
        assert inscribed_box(thing.shape, region.box) == pytest.approx(thing.box)


def test_phrases_fit_their_blocks() -> None:
    tokenizer = load_tokenizer()
    longest = max(len(tokenizer(phrase(s, c)).input_ids) for s in SHAPES for c in COLOURS)
    assert longest == 5
    assert longest < EntityRecipe.entity_tokens


def test_what_sees_what() -> None:
    ids, mask = entity_inputs([[RIGHT], []], tokens=8)
    text, total = 32 + BLOCKS * 8, 32 + BLOCKS * 8 + 64
    assert ids.shape == (2, BLOCKS, 8)
    assert torch.equal(ids[0, 0], encode_captions(["a blue star"])[0, :8])
    assert mask.shape == (2, 1, total, total)
    assert mask.dtype == torch.bool
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[:4, 4:] = True
    block = slice(32, 40)
    seen = mask[0, 0]
    assert torch.equal(seen[text:, block], inside.flatten()[:, None].expand(64, 8))
    assert torch.equal(seen[block, text:], inside.flatten().expand(8, 64))
    assert seen[block, block].all()
    assert not seen[:32, block].any()
    assert not seen[block, :32].any()
    hidden = torch.eye(2 * 8, dtype=torch.bool)
    assert torch.equal(seen[40:text, 40:text], hidden)
    assert not seen[text:, 40:text].any()
    everyone = [*range(32), *range(text, total)]
    assert mask[:, 0][:, everyone][:, :, everyone].all()
    assert not mask[1, 0][everyone][:, 32:text].any()
    with pytest.raises(ValueError, match="4 entities: there are 3 blocks"):
        entity_inputs([[LEFT] * 4], 8)


@pytest.mark.parametrize("adapted", [False, True])
def test_training_computes_what_the_control_computes(adapted: bool) -> None:
    """The velocity of one step: a batch with two regions, one and none, against the pipeline under EliGen."""
    model = dit.transformer()
    pipe = assemble(model, models.flow_scheduler())
    pipe.set_progress_bar_config(disable=True)
    if adapted:
        for matrix in add_lora(model, 2):
            torch.nn.init.normal_(matrix, std=0.3)
    seen = []
    hook = model.register_forward_hook(lambda m, a, k, out: seen.append((a, k, out[0])), with_kwargs=True)
    with ac.control(pipe, ac.EliGen(REGIONS, entity_tokens=8), record=False):
        generator = torch.Generator().manual_seed(0)
        pipe(PROMPTS, num_inference_steps=1, max_sequence_length=32, generator=generator, output_type="latent")
    hook.remove()
    args, kwargs, controlled = seen[0]
    signature = Signature(type(model).forward)
    packed, sigmas = (signature.get(args, kwargs, name) for name in ("hidden_states", "timestep"))
    noisy = pictures_of_blocks(packed, (1, 8, 8))
    with torch.no_grad():
        velocity = Velocity(model, pipe.text_encoder)
        trained = velocity(noisy, sigmas, encode_captions(PROMPTS), *entity_inputs(REGIONS, 8))
        plain = velocity(noisy, sigmas, encode_captions(PROMPTS))
    controlled = pictures_of_blocks(controlled, (1, 8, 8))
    torch.testing.assert_close(trained, controlled, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(trained[2], plain[2], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(trained[:2], plain[:2], atol=1e-3)


def test_samples_depend_on_seed_and_step_and_a_quarter_has_no_entities() -> None:
    recipe = EntityRecipe(batch=200)
    scenes = [sample_scene(scene_rng(1, i)) for i in range(50)]
    latents = torch.randn(50, 4, 16, 16, generator=torch.Generator().manual_seed(0)).half()
    one, again, other = (draw_entities(recipe, step, latents, scenes) for step in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[3], other[3])
    masks = [draw_entities(recipe, step, latents, scenes)[5] for step in range(5)]
    bare = [~mask[:, 0, -64:, 32:-64].any(dim=(1, 2)) for mask in masks]
    assert np.mean([b.float().mean() for b in bare]) == pytest.approx(0.25, abs=0.05)
    empty = (one[3] == encode_captions([""])).all(dim=1)
    assert empty.any()
    assert bare[0][empty].all()


def test_a_fresh_lora_does_nothing_and_trains_alone() -> None:
    model = dit.transformer()
    given = {
        "hidden_states": torch.randn(1, 64, 16),
        "encoder_hidden_states": torch.randn(1, 32, 128),
        "pooled_projections": torch.randn(1, 128),
        "timestep": torch.tensor([0.5]),
        "txt_ids": torch.zeros(32, 3),
        "img_ids": torch.zeros(64, 3),
    }
    before = model(**given)[0]
    lora = add_lora(model, 2)
    assert torch.equal(model(**given)[0], before)
    assert {id(p) for p in lora} == {id(p) for p in model.parameters() if p.requires_grad}
    model(**given)[0].square().mean().backward()
    assert all(p.grad is None for n, p in model.named_parameters() if "lora" not in n)
    assert all(p.grad is not None for p in lora)


def test_the_lora_of_the_whole_model_fits_two_megabytes(tmp_path) -> None:
    model = models.transformer()
    adapted = {n.split(".lora_A")[0] for n, _ in add_lora_names(model)}
    assert len(adapted) == 8 + 4 + 7 * 5
    assert "proj_out" not in adapted
    save_lora(model, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [pretrained.LORA]
    assert 1.8e6 < (tmp_path / pretrained.LORA).stat().st_size <= 2e6


def add_lora_names(model):
    add_lora(model, EntityRecipe.rank)
    return [(n, p) for n, p in model.named_parameters() if ".lora_A" in n]


def test_a_lora_loads_with_its_model(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(pretrained, "_WEIGHTS", dit.write(tmp_path / "weights"))
    plain, adapted = pretrained.load("dit"), pretrained.load("dit+entities")
    assert type(adapted).__name__ == "FluxPipeline"
    assert adapted.get_list_adapters() == {"transformer": ["entities"]}

    def sample(pipe):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return pipe(
            "a red circle", num_inference_steps=2, max_sequence_length=32, generator=generator, output_type="latent"
        ).images

    assert not torch.allclose(sample(adapted), sample(plain), atol=1e-3)
    adapted.disable_lora()
    assert torch.equal(sample(adapted), sample(plain))
    with pytest.raises(ac.ControlError, match=r"unknown shapes model 'sd\+entities'; known: dit, sd, dit\+entities"):
        pretrained.load("sd+entities")
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    with pytest.raises(ac.ControlError, match=r"needs peft: pip install 'attnctrl\[lora\]'"):
        pretrained.load("dit+entities")
