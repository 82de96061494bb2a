import json

import pytest
import torch

from attnctrl.shapes import load, prompt_for, sample_scene, scene_rng, weights_path
from attnctrl.shapes.models import SCHEDULE
from attnctrl.shapes.train_autoencoder import psnr


@pytest.fixture(scope="module")
def pipeline():
    pipeline = load()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline, prompt, steps=4):
    generator = torch.Generator().manual_seed(0)
    return pipeline(prompt, num_inference_steps=steps, guidance_scale=3.5, generator=generator, output_type="pt").images


def test_stock_pipeline_in_miniature(pipeline):
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    assert pipeline.safety_checker is None
    assert pipeline.feature_extractor is None
    assert pipeline.unet.dtype == pipeline.vae.dtype == torch.float32
    assert {k: pipeline.scheduler.config[k] for k in SCHEDULE} == SCHEDULE
    assert pipeline.tokenizer.model_max_length == pipeline.text_encoder.config.max_position_embeddings == 32
    assert len(pipeline.tokenizer) == pipeline.text_encoder.config.vocab_size


def test_draws_128_pixels(pipeline):
    image = sample(pipeline, prompt_for([("circle", "red")], "white")[0])
    assert image.shape == (1, 3, 128, 128)
    assert torch.isfinite(image).all()


def test_round_trip(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    again = type(pipeline).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(sample(again, "a red circle"), sample(pipeline, "a red circle"))


def test_weights_are_small_and_half_precision():
    folder = weights_path()
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 12e6
    assert {p.suffix for p in files} <= {".json", ".safetensors", ".txt"}
    assert "_name_or_path" not in json.loads((folder / "unet" / "config.json").read_text())
    half = load(dtype=torch.float16)
    full = load()
    assert torch.equal(half.unet.conv_in.weight.float(), full.unet.conv_in.weight)


def test_autoencoder_keeps_its_images():
    assert psnr(load().vae, count=16) > 30


def test_follows_a_prompt(pipeline):
    from attnctrl.shapes import detect, present

    asked = [("circle", "red"), ("square", "blue")]
    image = sample(pipeline, prompt_for(asked, "white")[0], steps=15)[0]
    assert present(asked, detect(image)) == 1


def test_autoencoder_latents_are_white(pipeline):
    from attnctrl.shapes import render

    scenes = [sample_scene(scene_rng(12, i)) for i in range(16)]
    with torch.no_grad():
        z = pipeline.vae.encode(render(scenes) * 2 - 1).latents
    assert z.mean((0, 2, 3)).abs().max() < 0.4
    assert (z.std((0, 2, 3)) - 1).abs().max() < 0.4


def test_unknown_model():
    with pytest.raises(ValueError, match=r"unknown shapes model 'sdxl'; known: .*sd"):
        load("sdxl")


def dit(name="dit"):
    pipeline = load(name)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call(pipeline, prompt, steps=12, seed=0):
    """A guided picture of the FLUX-class model, (3, 128, 128)."""
    generator = torch.Generator().manual_seed(seed)
    given = {"max_sequence_length": 32, "true_cfg_scale": 3.5, "negative_prompt": "", "generator": generator}
    return pipeline(prompt, num_inference_steps=steps, output_type="pt", **given).images[0]


def test_the_flux_class_model_is_a_stock_pipeline_that_follows_a_prompt():
    from attnctrl.shapes import detect, present

    pipeline = dit()
    assert type(pipeline).__name__ == "FluxPipeline"
    asked = [("circle", "red")]
    image = call(pipeline, prompt_for(asked, "white")[0])
    assert image.shape == (3, 128, 128)
    assert present(asked, detect(image)) == 1


def test_the_flux_class_model_and_its_lora_are_small():
    files = [p for p in weights_path("dit").rglob("*") if p.is_file()]
    lora = [p for p in weights_path("dit+entities").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in lora) <= 2e6
    assert sum(p.stat().st_size for p in files) - sum(p.stat().st_size for p in lora) <= 12e6


def test_the_entity_lora_moves_objects_and_leaves_the_model_as_it_was():
    from attnctrl import EliGen, Region, control
    from attnctrl.shapes import detect, in_box

    asked, boxes = [("circle", "red"), ("square", "blue")], [(0.05, 0.05, 0.4, 0.4), (0.58, 0.6, 0.95, 0.95)]
    prompt, phrases = prompt_for(asked, "white")
    regions = [Region(phrase, box=box) for phrase, box in zip(phrases, boxes, strict=True)]
    pipeline = dit("dit+entities")
    with control(pipeline, EliGen(regions, entity_tokens=8)):
        assert in_box(asked, boxes, detect(call(pipeline, prompt))) == 1
    pipeline.disable_lora()
    assert torch.equal(call(pipeline, prompt, steps=2), call(dit(), prompt, steps=2))


def test_the_video_model_is_a_stock_pipeline_that_follows_a_motion():
    from attnctrl.shapes import VIDEO_CALL, detect
    from attnctrl.shapes.captions_video import clip_prompt
    from attnctrl.shapes.score_clip import score_clip

    pipeline = load("video")
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline).__name__ == "WanPipeline"
    asked = [("circle", "red", "right")]
    prompt, _ = clip_prompt(asked, "white")
    given = {"num_inference_steps": 16, "guidance_scale": 3.5, "generator": torch.Generator().manual_seed(0)}
    frames = pipeline(prompt, output_type="np", **given, **VIDEO_CALL).frames[0]
    assert frames.shape == (9, 128, 128, 3)
    score = score_clip(asked, [detect(frame) for frame in frames], "white")
    assert score.kept > 0.8
    assert score.moving == 1


def test_the_video_model_knows_both_ways_of_both_axes():
    from attnctrl.shapes import VIDEO_CALL, detect
    from attnctrl.shapes.captions_video import clip_prompt
    from attnctrl.shapes.motion import MOTIONS
    from attnctrl.shapes.score_clip import score_clip

    pipeline = load("video")
    pipeline.set_progress_bar_config(disable=True)
    asked = [[("square", "blue", motion)] for motion in MOTIONS]
    given = {"num_inference_steps": 12, "guidance_scale": 3.5, "generator": torch.Generator().manual_seed(1)}
    drawn = pipeline([clip_prompt(one, "white")[0] for one in asked], output_type="np", **given, **VIDEO_CALL).frames
    scores = [
        score_clip(one, [detect(frame) for frame in frames], "white") for one, frames in zip(asked, drawn, strict=True)
    ]
    assert [score.moving for score in scores] == [1] * 5


def test_the_video_model_is_small():
    files = [p for p in weights_path("video").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 15e6
    assert not any("/train" in p.read_text() for p in files if p.suffix == ".json")


def test_the_instruct_model_does_as_it_is_told():
    from attnctrl.shapes import Scene, Thing, detect, instruction_for, render

    pipeline = load("instruct")
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline).__name__ == "StableDiffusionInstructPix2PixPipeline"
    picture = render(
        [Scene((Thing("circle", "red", 0.3, 0.3, 0.17), Thing("square", "blue", 0.7, 0.7, 0.17)), "white")]
    )
    image = pipeline(
        instruction_for([("red circle", "green circle")]),
        image=picture,
        num_inference_steps=16,
        guidance_scale=5.0,
        image_guidance_scale=1.5,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images[0]
    found = detect(image)
    assert {(thing.shape, thing.colour) for thing in found.objects} == {("circle", "green"), ("square", "blue")}
    assert found.background == "white"


def test_the_instruct_model_is_small():
    files = [p for p in weights_path("instruct").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 9e6
    assert {p.suffix for p in files} <= {".json", ".safetensors"}
